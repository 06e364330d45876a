"""The container recipes, as far as they can be checked without building them."""

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

PROJECT = Path("pyproject.toml")
DOCKERFILE = Path("containers/Dockerfile")
APPTAINER = Path("containers/distributed_lm.def")
# What `pip install` of this repository reads.
NEEDED = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "constraints-cuda.txt",
    "distributed_lm",
    "launch",
}


def copied(recipe: Path) -> set[str]:
    """Paths that it takes from the repository."""
    text = recipe.read_text()
    if recipe == DOCKERFILE:
        lines = re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE)
    else:
        section = text.partition("%files")[2].partition("\n%")[0]
        lines = re.findall(r"^\s+(\S+) \S+$", section, flags=re.MULTILINE)
    return {path for line in lines for path in line.split()}


@pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=lambda path: path.name)
class TestRecipes:
    def test_installs_what_the_lock_file_says(self, recipe: Path) -> None:
        [install] = re.findall(r"pip install.*", recipe.read_text())
        assert install.endswith(" --constraint constraints-cuda.txt")
        assert "'.[" in install

    def test_python_is_the_lock_files_and_supported(self, recipe: Path) -> None:
        base = re.compile(r"^from:? python:([\d.]+)-", re.MULTILINE | re.IGNORECASE)
        [version] = base.findall(recipe.read_text())
        assert Path("constraints-cuda.txt").read_text().startswith(f"# Python {version} ")
        supported = re.search(r'^requires-python = "(.*)"', PROJECT.read_text(), re.MULTILINE)
        assert supported is not None
        assert version in SpecifierSet(supported[1])

    def test_copies_what_is_there_and_needed(self, recipe: Path) -> None:
        assert copied(recipe) == NEEDED
        assert all(Path(path).exists() for path in NEEDED)

    def test_says_that_nobody_has_built_it(self, recipe: Path) -> None:
        assert "NOT BUILT HERE" in recipe.read_text()

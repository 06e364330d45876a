"""What is handed to the user runs: every config in ``configs/runs`` and every README command."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_lm.config import load_config
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, train_run

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
# Of the WikiText-103 arms, those at one length: the others differ in three numbers, which
# tests/unit/test_wikitext103.py checks.
CONFIGS = [
    path for path in RUNS if not path.stem.startswith("wikitext103") or path.stem.endswith("_L512")
]

# Keeps each config's lengths, positions, precision, optimizer and schedule; shrinks the rest.
SHRUNK = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4",
    "model.ffn_hidden_size=128", "model.vocab_size=null", "parallel.tensor=1",
    "batch.global_batch_size=8", "batch.micro_batch_size=2", "train.steps=2", "train.log_every=1",
    "evaluation.max_tokens=9000",
)  # fmt: skip

# A batch of whole blocks, and bands of the bytes.
WIKITEXT = ("batch.global_batch_size=12", "model.adaptive.cutoffs=[32,96]")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_when_shrunk(path: Path, demo_data: Path, tmp_path: Path) -> None:
    overrides = [*SHRUNK, f"data.path={demo_data}", f"output_dir={tmp_path}"]
    overrides += WIKITEXT if path.stem.startswith("wikitext103") else ()
    config = load_config(path, [*overrides, "tracking.wandb=disabled"])
    run_distributed(train_run, 1, config)
    records = Runs.records(config)
    assert [line["step"] for line in records["train"]] == [1, 2]
    assert [line["length"] for line in records["evaluation"]] == list(config.evaluation_lengths)


def readme_commands() -> list[str]:
    """The lines of the ``sh`` blocks, without ``make`` targets (they install, test and demo)."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "make "))]


def test_readme_commands_run_in_order(
    demo_data: Path, speeches_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "speeches").mkdir()
    for speech in sorted(speeches_folder.glob("*.txt"))[:30]:
        shutil.copy(speech, tmp_path / "speeches")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sotu-bytes").symlink_to(demo_data)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
    }
    commands = readme_commands()
    assert len(commands) >= 4
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert list((tmp_path / "runs" / "smoke" / "evaluation").glob("*_512.json"))

"""What ``status`` makes of Slurm's answers. The commands are stand-ins that print recorded ones;
``tests/slurm`` asks the real ones."""

from pathlib import Path

import pytest

from launch.status import _in_slurm

SACCT = """\
41|COMPLETED|0:0|None
42|NODE_FAIL|1:0|NodeDown
"""


def stand_in(folder: Path, name: str, output: str, code: int = 0) -> None:
    answer = folder / f"{name}.out"
    answer.write_text(output)
    command = folder / name
    command.write_text(f"#!/bin/sh\n/bin/cat {answer}\nexit {code}\n")
    command.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_job_in_the_queue(commands: Path) -> None:
    stand_in(commands, "squeue", "42 RUNNING    node[1-2] None\n")
    assert _in_slurm(["42"]) == "queue: 42 RUNNING node[1-2] None"


def test_accounting_is_asked_of_jobs_that_are_gone(commands: Path) -> None:
    stand_in(commands, "squeue", "", 1)
    stand_in(commands, "sacct", SACCT)
    assert _in_slurm(["41", "42"]) == (
        "queue: no job of this run; sacct: job 42 NODE_FAIL, exit code 1:0, NodeDown"
    )


def test_cluster_without_accounting(commands: Path) -> None:
    stand_in(commands, "squeue", "", 1)
    assert _in_slurm(["42"]) == "queue: no job of this run; sacct is not here to ask"
    stand_in(commands, "sacct", "", 1)
    assert _in_slurm(["42"]) == (
        "queue: no job of this run; no accounting to ask (sacct has nothing on it)"
    )


def test_no_slurm_at_all(commands: Path) -> None:
    assert _in_slurm(["42"]) == "squeue is not here to ask"

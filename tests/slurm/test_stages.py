"""Graphs of stages on a cluster whose preempted jobs are lost, so that a run goes on in another."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.supervisor.journal import CANCELLED, read_journal
from tests.support.runs import SMOKE
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import CLUSTER, LENGTH, Job

LEARNING_RATE = 1.25e-3


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with SlurmCluster(preempt_mode="CANCEL") as cluster:
        yield cluster


class Study:
    """Runs of one process each, and the file of their stages."""

    def __init__(self, slurm: SlurmCluster, data: Path, folder: Path) -> None:
        self.slurm = slurm
        self.folder = folder
        fixed = [f"data.path={data}", f"output_dir={folder}", "tracking.wandb=disabled"]
        self.overrides = [*fixed, *LENGTH]

    def run(self, name: str, *overrides: str, **task: Any) -> dict[str, Any]:
        """A task on a run."""
        fields = [*self.overrides, f"name={name}", *overrides]
        return {"config": str(Path(SMOKE).resolve()), "overrides": fields, **task}

    def evaluation(self, name: str, *overrides: str) -> dict[str, Any]:
        return self.run(name, *overrides, command=["evaluate", "--lengths", "64,128"])

    def ledger(self, first: str, second: str) -> dict[str, Any]:
        """A plain command that needs the records of two runs."""
        return {"command": ["ledger", f"{self.folder}/{first}", f"{self.folder}/{second}"]}

    def write(self, **stages: tuple[list[str], list[dict[str, Any]]]) -> None:
        listed = [
            {"name": name, "after": after, "tasks": tasks}
            for name, (after, tasks) in stages.items()
        ]
        graph = {"name": "study", "folder": f"{self.folder}/study", "stages": listed}
        (self.folder / "stages.yaml").write_text(yaml.safe_dump(graph))

    def submit(self, *options: str, **fields: Any) -> str:
        values = {
            **yaml.safe_load(CLUSTER.read_text()), "nodes": 1, "health_check": False, **fields
        }  # fmt: skip
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(values))
        done = self.launch("stages", self.folder / "stages.yaml", "--cluster", path, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def launch(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *arguments]
        return self.slurm.run(command, cwd=Path.cwd(), check=False)

    def of_run(self, name: str) -> Job:
        return Job(self.slurm, self.folder / name, "")

    def events(self, place: str, event: str) -> list[dict[str, Any]]:
        journal = read_journal(self.folder / place)
        return [one for one in journal if one["event"] == event]

    def queue(self) -> set[str]:
        return set(self.slurm.run(["squeue", "-h", "-r", "-o", "%i"]).stdout.split())

    def wait_for_empty_queue(self, seconds: float) -> None:
        self.slurm.wait_until(lambda: not self.queue() or None, seconds, "empty queue")


@pytest.fixture
def study(slurm: SlurmCluster, demo_data: Path, tmp_path: Path) -> Iterator[Study]:
    study = Study(slurm, demo_data, tmp_path)
    yield study
    slurm.run(["scancel", "--me"])
    study.wait_for_empty_queue(60)


def test_stages_follow_a_run_into_its_next_job(study: Study) -> None:
    study.write(
        tune=([], [study.run("proxy", "train.steps=4")]),
        choose=(["tune"], [study.ledger("proxy", "proxy")]),
        train=(["choose"], [study.run("big", "train.steps=60")]),
        evaluate=(["train"], [study.evaluation("big", "train.steps=60")]),
    )
    study.submit()
    # As a command between the stages does with what it has found out: the run has not begun.
    config = study.folder / "big/slurm/config.yaml"
    values = yaml.safe_load(config.read_text())
    values["optimizer"]["learning_rate"] = LEARNING_RATE
    config.write_text(yaml.safe_dump(values))
    big = study.of_run("big")
    big.reach(12, 120)
    study.slurm.submit(
        "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
    )
    study.wait_for_empty_queue(180)
    # It was lost, and went on as another job. The evaluation was let in, and came back after it.
    first, second = big.journal("life")
    assert first["job"].split("_")[0] != second["job"].split("_")[0]
    [came_too_early] = study.events("big/slurm/evaluate", "leave")
    assert f"{big.run_dir} goes on in job " in came_too_early["message"]
    [attempt] = study.events("big/slurm/evaluate", "attempt")
    assert attempt["time"] > big.journal("finished")[0]["time"]
    results = [json.loads(path.read_text()) for path in big.run_dir.glob("evaluation/*.json")]
    assert {(one["length"], one["step"]) for one in results} == {(64, 60), (128, 60)}
    assert max(record["learning_rate"] for record in big.records("train")) == LEARNING_RATE
    # In their order, and each once.
    places = ("proxy/slurm", "study/slurm/ledger", "big/slurm", "big/slurm/evaluate")
    starts = [study.events(place, "attempt")[0]["time"] for place in places]
    ends = [event["time"] for place in places for event in study.events(place, "finished")]
    assert starts == sorted(starts)
    assert len(ends) == len(places)
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))
    # What is done is left out, and the config that was filled in stays.
    said = study.submit()
    assert said.count("finished already, left out") == 4
    assert study.queue() == set()
    assert yaml.safe_load(config.read_text()) == values


def test_what_failed_stops_what_needs_it_and_nothing_else(study: Study) -> None:
    mistake = "evaluation.max_tokens=32"  # found when the data are read
    study.write(
        train=([], [study.run("good", "train.steps=4"), study.run("bad", mistake)]),
        evaluate=(["train"], [study.evaluation("good", "train.steps=4"), study.evaluation("bad")]),
        compare=(["train"], [study.ledger("good", "bad")]),
        again=(["compare"], [{**study.ledger("good", "good"), "part": "again"}]),
    )
    study.submit()
    study.wait_for_empty_queue(120)
    assert study.events("good/slurm/evaluate", "finished")
    for place in ("bad/slurm/evaluate", "study/slurm/ledger"):
        [leave] = study.events(place, "leave")
        assert leave["message"].startswith(f"{study.folder}/bad ended without being finished (mist")
        assert not study.events(place, "attempt")
        number = study.slurm.job(leave["job"])
        assert (number["JobState"], number["ExitCode"]) == ("FAILED", "1:0")
    [leave] = study.events("study/slurm/again", "leave")
    assert leave["message"].startswith(f"{study.folder}/study's ledger ended without being finish")
    # Launched again, only what is left is: the run with its mistake, and what needs it.
    said = study.submit("--limit=1", sbatch_options=["--hold"])
    assert said.count("finished already, left out") == 2
    assert "evaluate: " + str(study.folder / "bad") + "'s evaluate: job " in said


def test_cancel(study: Study) -> None:
    study.write(
        train=([], [study.run("one"), study.run("two")]),
        evaluate=(["train"], [study.evaluation("one"), study.evaluation("two")]),
        compare=(["evaluate"], [study.ledger("one", "two")]),
    )
    study.submit("--chain=1", sbatch_options=["--hold"])
    before = study.queue()
    assert len(before) == 10
    one = {
        job
        for place in ("one/slurm", "one/slurm/evaluate")
        for event in study.events(place, "submitted")
        for job in event["jobs"]
    }
    assert len(one) == 4
    done = study.launch("cancel", study.folder / "one")
    assert (done.returncode, done.stderr) == (0, "")
    assert study.queue() == before - one
    assert (study.folder / "one/slurm/evaluate" / CANCELLED).exists()
    assert not (study.folder / "two/slurm" / CANCELLED).exists()
    # A controller that does not answer has cancelled nothing, and nothing is said to be.
    study.slurm.stop_controller()
    failed = study.launch("cancel", study.folder / "study")
    study.slurm.start_controller()
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: scancel said: ")
    assert len(failed.stderr.splitlines()) == 1
    assert not (study.folder / "two/slurm" / CANCELLED).exists()
    assert study.queue() == before - one
    assert study.launch("cancel", study.folder / "study").returncode == 0
    assert study.queue() == set()
    again = study.launch("cancel", study.folder / "study")
    assert (again.returncode, again.stdout.split(": ")[1]) == (0, "no job of it is in the queue\n")

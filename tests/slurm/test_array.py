"""Several runs as one job array, and their evaluations after them."""

import json
import sys
from pathlib import Path

from tests.support.runs import SMOKE
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import CLUSTER, LENGTH, Job, Jobs


def arm(folder: Path, name: str, jobs: Jobs, *fields: str) -> Path:
    """A config file of one arm of a comparison."""
    lines = [f"extends: {Path(SMOKE).resolve()}", f"name: {name}", *fields]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines))
    return path


def test_arms_and_their_evaluations(
    slurm: SlurmCluster, demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    jobs = Jobs(slurm, demo_data, tmp_path)
    arms = [
        arm(tmp_path, "alibi", jobs),
        arm(tmp_path, "sinusoidal", jobs, "model:", "  position: sinusoidal"),
    ]
    command = [sys.executable, "-m", "launch", "array", *arms, *jobs.fixed, *LENGTH]
    slurm.run([*command, f"--cluster={CLUSTER}", "--limit=1", "--evaluate=64"], cwd=Path.cwd())
    runs = [Job(slurm, tmp_path / name, "") for name in ("alibi", "sinusoidal")]
    # A warning on the way: the task comes back like any job, and takes no other along.
    runs[1].reach(12, 120)
    slurm.signal_batch(runs[1].journal("life")[0]["job"], "USR1")
    for run in runs:
        run.finish(180)
    assert [len(run.journal("life")) for run in runs] == [1, 2]
    assert runs[0].losses() == expected
    assert runs[1].losses()[0] != expected[0]
    slurm.wait_until(lambda: not slurm.run(["squeue", "-h"]).stdout or None, 120, "empty queue")
    perplexities = {}
    for run in runs:
        for path in (run.run_dir / "evaluation").glob("*.json"):
            result = json.loads(path.read_text())
            perplexities[run.run_dir.name, result["length"]] = result["perplexity"]
    assert set(perplexities) == {(name, 64) for name in ("alibi", "sinusoidal")}
    trained, evaluated = (
        [_jobs_time(run.run_dir / "slurm" / part) for run in runs] for part in ("", "evaluate_64")
    )
    for (_, train_end), (evaluation_start, _) in zip(trained, evaluated, strict=True):
        assert train_end < evaluation_start
    assert trained[0][1] < trained[1][0], "more than one run at once"


def _jobs_time(folder: Path) -> tuple[float, float]:
    """When the first life of a job began and when its work was finished."""
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    lives = [event["time"] for event in events if event["event"] == "life"]
    ends = [event["time"] for event in events if event["event"] == "finished"]
    return lives[0], ends[-1]

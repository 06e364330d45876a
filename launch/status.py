"""``python -m launch status | logs RUN``: from files, and from Slurm where it answers."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed_lm.config import RunConfig, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.tracking.metrics_file import read_records
from launch.environment import environment_without_slurm
from launch.goodput import goodput
from launch.supervisor.journal import CANCELLED, JOURNAL, job_ids, newest_step, read_journal

Record = dict[str, Any]
Line = tuple[str, str]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
PartOption = Annotated[
    str, typer.Option(help="Of an array: what is done beside the training, as evaluate_2048.")
]

SLURM_SECONDS = 30
FOLLOW_SECONDS = 0.5
TAIL_LINES = 40
RECENT_STEPS = 20
# What the journal says of restarts.
RESTARTS = ("crash", "hang", "stopped", "sick", "leave")


def status(run_dir: RunArgument, part: PartOption = "") -> None:
    """Say how a run is doing: state, progress, restarts, and where its time went."""
    journal = read_journal(run_dir / "slurm" / part)
    metrics = [] if part else read_records(run_dir / "metrics.jsonl")
    parts = sorted(path.parent.name for path in run_dir.glob(f"slurm/*/{JOURNAL}"))
    if not journal and not metrics:
        known = f"; --part knows {', '.join(parts)}" if parts else ""
        raise ConfigError(
            f"{run_dir / 'slurm' / part if part else run_dir}: no run has been started in this "
            f"folder; give a run folder{known}"
        )
    lines = [("run", str(run_dir)), ("state", _state(run_dir / "slurm" / part, journal))]
    if parts and not part:
        lines.append(("parts", f"{', '.join(parts)} (see --part)"))
    if not part:
        lines += _progress(_config(run_dir), metrics)
    lines += _restarts(journal)
    lines += _time(metrics, journal)
    for name, text in lines:
        typer.echo(f"{name:<14} {text}")


def logs(
    run_dir: RunArgument,
    rank: Annotated[int, typer.Option(min=0, help="Whose log; 0 is the readable one.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as it grows.")] = False,
    part: PartOption = "",
) -> None:
    """Show the end of a rank's log."""
    path = run_dir / "logs" / part / f"rank_{rank}.log"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            sys.stdout.write("".join(file.readlines()[-TAIL_LINES:]))
            while follow:
                sys.stdout.write(file.read())
                sys.stdout.flush()
                time.sleep(FOLLOW_SECONDS)
    except FileNotFoundError:
        known = ", ".join(sorted(found.name for found in path.parent.glob("*.log"))) or "none"
        raise ConfigError(f"{path}: no such log; there are: {known}") from None
    except KeyboardInterrupt:
        return


def _state(slurm_dir: Path, journal: Sequence[Record]) -> str:
    if not journal:
        return "started without Slurm"
    last = journal[-1]
    since = datetime.fromtimestamp(last["time"]).strftime("%Y-%m-%d %H:%M:%S")
    said = f"{last['event']}: {last['message']}".splitlines()[0] + f" ({since})"
    if last["event"] == "finished":
        return said
    if (slurm_dir / CANCELLED).exists():
        return "cancelled"
    return f"{said}; {_in_slurm(job_ids(journal))}"


def _in_slurm(jobs: Sequence[str]) -> str:
    """What Slurm says of the jobs of a run: its queue, or of past ones its accounting."""
    asked = _ask("squeue", "--noheader", "--format=%i %T %N %r", f"--jobs={','.join(jobs)}")
    if asked is None:
        return "squeue is not here to ask"
    queue = [" ".join(line.split()) for line in asked.splitlines()]
    words = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED")
    waiting = [line for line in queue if any(word in line for word in words)]
    if waiting:
        return f"queue: {'; '.join(waiting)}"
    return f"queue: no job of this run; {_accounted(jobs)}"


def _accounted(jobs: Sequence[str]) -> str:
    """How the last of some jobs ended, by Slurm's accounting, which not every cluster has."""
    asked = _ask(
        "sacct", "-n", "-X", "-P", "--format=JobID,State,ExitCode,Reason",
        f"--jobs={','.join(jobs)}",
    )  # fmt: skip
    if asked is None:
        return "sacct is not here to ask"
    found = [line.split("|") for line in asked.splitlines() if line.count("|") == 3]
    if not found:
        return "no accounting to ask (sacct has nothing on it)"
    job, state, code, reason = found[-1]
    why = f", {reason}" if reason not in ("", "None") else ""
    return f"sacct: job {job} {state}, exit code {code}{why}"


def _progress(config: RunConfig | None, metrics: Sequence[Record]) -> list[Line]:
    train = [record for record in metrics if record["kind"] == "train"]
    if not train or config is None:
        return [("progress", "no step yet")]
    newest = train[-1]
    recent = [
        record["step_seconds"] for record in train[-RECENT_STEPS:] if "step_seconds" in record
    ]
    left = (config.train.steps - newest["step"]) * statistics.median(recent or [0.0])
    saved = newest_step(config.run_dir)
    return [
        ("step", f"{newest['step']} of {config.train.steps}"),
        ("loss", f"{newest['loss']:.4f}"),
        ("speed", f"{newest.get('tokens_per_second', 0.0):,.0f} tokens/s"),
        ("eta", str(timedelta(seconds=round(left)))),
        ("checkpoint", f"step {saved}" if saved else "none yet"),
    ]


def _restarts(journal: Sequence[Record]) -> list[Line]:
    lives = [event for event in journal if event["event"] == "life"]
    lines = []
    if lives:
        nodes = ", ".join(lives[-1].get("nodes", []))
        lines.append(("nodes", f"{nodes} (job {lives[-1]['job']}, life {len(lives)})"))
    for event in journal:
        if event["event"] in RESTARTS:
            at = datetime.fromtimestamp(event["time"]).strftime("%m-%d %H:%M:%S")
            lines.append((event["event"], f"{at} {event['message'].splitlines()[0]}"))
    return lines


def _time(metrics: Sequence[Record], journal: Sequence[Record]) -> list[Line]:
    if not journal:
        return []
    spent = goodput(metrics, journal)
    parts = ("training", "repeated", "saving", "evaluating", "queueing", "starting")
    return [
        ("goodput", f"{spent.share:.0%} of {timedelta(seconds=round(spent.total))}"),
        ("time", ", ".join(f"{part} {getattr(spent, part):,.0f} s" for part in parts)),
    ]


def _config(run_dir: Path) -> RunConfig | None:
    for path in (run_dir / "slurm" / "config.yaml", run_dir / "config.yaml"):
        if path.exists():
            return load_config(path)
    return None


def _ask(*command: str) -> str | None:
    """What a command of Slurm's says; None where it cannot be asked."""
    if shutil.which(command[0]) is None:
        return None
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SLURM_SECONDS,
            env=environment_without_slurm(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return asked.stdout

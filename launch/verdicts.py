"""What the records of a short run say about a cluster: the verdicts of ``launch check``.

Pure functions over lines of ``metrics.jsonl`` and of the journal: those of one launch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

# Of the losses of 20 steps, relative, to those of one process: the rule of the project's own tests.
TOLERANCE = {"fp32": 5e-6, "bf16": 1e-2, "fp16": 1e-2}
# A failure of the job that nothing of ours has provoked.
TROUBLE = ("sick", "crash", "hang", "mistake", "loop")


@dataclass(frozen=True)
class Finding:
    """One line of a rung's report."""

    name: str
    text: str
    is_good: bool = True


def losses(metrics: Sequence[Record]) -> dict[int, float]:
    """By step, in the life that counted."""
    return {line["step"]: line["loss"] for line in metrics if line["kind"] == "train"}


def trouble(journal: Sequence[Record], allowed: Sequence[str] = ()) -> str | None:
    """What went wrong by itself, in a line; None if nothing did."""
    for event in journal:
        if event["event"] in TROUBLE and event["event"] not in allowed:
            # Of a failed rank: its last words, and after them the launcher's.
            return f"{event['event']}: {'; '.join(event['message'].strip().splitlines()[-2:])}"
    return None


def judge_reference(found: Mapping[int, float], steps: int) -> Finding:
    """The losses of one process, with which the other rungs' are compared."""
    problem = _incomplete(found, steps)
    if problem is not None:
        return Finding("losses", problem, False)
    text = f"{steps} steps, {found[1]:.4f} to {found[steps]:.4f}; the other rungs are held to them"
    return Finding("losses", text, found[steps] < found[1])


def judge_parity(
    found: Mapping[int, float], expected: Mapping[int, float], steps: int, precision: str
) -> Finding:
    """The losses of many processes beside those of one."""
    problem = _incomplete(found, steps)
    if problem is not None:
        return Finding("parity", problem, False)
    tolerance = TOLERANCE[precision]
    apart = {step: _relative(found[step], expected[step]) for step in range(1, steps + 1)}
    worst = max(apart, key=lambda step: apart[step])
    text = f"{steps} steps within {apart[worst]:.1e} of one process (allowed: {tolerance:.0e})"
    if apart[worst] <= tolerance:
        return Finding("parity", text)
    first = next(step for step in apart if apart[step] > tolerance)
    return Finding("parity", f"{text}; the first step beyond it is {first}", False)


def judge_bandwidth(journal: Sequence[Record], nodes: int) -> Finding:
    """Of the all-reduce between the nodes that the health check does."""
    if nodes == 1:
        return Finding("all-reduce", "not measured: there is one node")
    checks = [event for event in journal if event["event"] == "health"]
    if not checks:
        return Finding("all-reduce", "not measured: the cluster file turns health_check off")
    speed = checks[0].get("gigabytes_per_second")
    if speed is None:
        return Finding("all-reduce", first_line(checks[0]["message"]), False)
    return Finding("all-reduce", f"{speed:.2f} GB/s between {nodes} nodes")


def judge_speed(metrics: Sequence[Record]) -> Finding:
    """Medians of the later half of the steps, when everything is warm."""
    lines = [line for line in metrics if line["kind"] == "train"]
    if not lines:
        return Finding("speed", "no step is on record", False)
    later = lines[len(lines) // 2 :]
    speed, each, mfu = (
        statistics.median(line[name] for line in later)
        for name in ("tokens_per_second", "tokens_per_second_per_device", "mfu")
    )
    return Finding("speed", f"{speed:,.0f} tokens/s, {each:,.0f} per device, MFU {mfu:.1%}")


def step_seconds(metrics: Sequence[Record]) -> float:
    """Median of a step."""
    return statistics.median(line["step_seconds"] for line in metrics if line["kind"] == "train")


def judge_kill(metrics: Sequence[Record], precision: str) -> Finding:
    """Steps that the killed ranks had done, beside the same steps after the resumption."""
    lives = _lives(metrics)
    if len(lives) < 2:
        return Finding("kill", "the run did not go on after its ranks were killed", False)
    killed, resumed = losses(lives[0]), losses(lives[1])
    twice = sorted(killed.keys() & resumed.keys())
    last, start = max(killed, default=0), min(resumed, default=1) - 1
    text = f"all ranks killed at step {last}, went on from step {start}"
    if start == 0:
        return Finding("kill", f"{text}: no checkpoint was used", False)
    if start > last or not twice:
        return Finding("kill", f"{text}; no step was done twice", start <= last)
    worst = max(_relative(killed[step], resumed[step]) for step in twice)
    text += f", {len(twice)} steps done twice agree within {worst:.1e}"
    return Finding("kill", text, worst <= TOLERANCE[precision])


def judge_requeue(metrics: Sequence[Record], journal: Sequence[Record]) -> Finding:
    """A job that was warned: it saves, is queued again and goes on where it was."""
    stops = [line for line in metrics if line.get("event") == "stop"]
    if not stops:
        return Finding("requeue", "warned, and nothing was saved", False)
    step = stops[-1]["step"]
    after = metrics[list(metrics).index(stops[-1]) :]
    resumed = [line["step"] for line in after if line.get("event") == "resume"]
    lives = [event for event in journal if event["event"] == "life"]
    if not resumed or len(lives) < 2:
        return Finding("requeue", f"warned, saved step {step}, and did not come back", False)
    if resumed[0] != step:
        text = f"warned, saved step {step}, but went on from step {resumed[0]}"
        return Finding("requeue", text, False)
    stopped = [event["time"] for event in journal if event["event"] == "stopped"]
    waited = lives[-1]["time"] - stopped[-1] if stopped else 0.0
    text = f"warned, saved step {step}, was back after {waited:.0f} s and went on from there"
    return Finding("requeue", text)


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _lives(metrics: Sequence[Record]) -> list[list[Record]]:
    """The lines between one resumption and the next."""
    lives: list[list[Record]] = []
    for line in metrics:
        if line.get("event") == "resume" or not lives:
            lives.append([])
        lives[-1].append(line)
    return lives


def _incomplete(found: Mapping[int, float], steps: int) -> str | None:
    missing = [step for step in range(1, steps + 1) if step not in found]
    if missing:
        return f"step {missing[0]} of {steps} is not on record"
    strange = [step for step in range(1, steps + 1) if not math.isfinite(found[step])]
    return f"the loss of step {strange[0]} is {found[strange[0]]}" if strange else None


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)

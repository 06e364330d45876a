"""``distributed-lm demo``: the paper's effect on a laptop, with the code that runs on a cluster.

Trains an ALiBi and a sinusoidal model of equal size at a short length L on two processes (TP=2),
always on the CPU, evaluates both at L … 8L, and says what came out. Runs that are already there are
not trained again.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from distributed_lm import platform
from distributed_lm.config import RunConfig, load_config
from distributed_lm.errors import TrainingError
from distributed_lm.study.extrapolation import Curve, draw, markdown_table, read_curve

CONFIG = Path("configs/runs/demo.yaml")
POSITIONS = {"alibi": "ALiBi", "sinusoidal": "sinusoidal"}

# What the demo must show at 2L … 8L: the paper's effect.
ALIBI_LIMIT = 1.05
SINUSOIDAL_AT_2L = 1.3


def demo(output_dir: Path, config_path: Path = CONFIG, overrides: tuple[str, ...] = ()) -> None:
    """Train, evaluate, and report into ``output_dir``.

    Args:
        overrides: of the config, for both arms.

    Raises:
        TrainingError: if a run fails, or the effect does not show.
    """
    console = Console(soft_wrap=True, highlight=False)
    precision = faster_precision()
    console.print(f"precision {precision}: the faster matrix product on this machine")
    arms: list[RunConfig] = []
    for position, label in POSITIONS.items():
        arguments = [
            f"name={output_dir.name}-{position}",
            f"output_dir={output_dir}",
            f"model.position={position}",
            f"precision={precision}",
            *overrides,
        ]
        arms.append(load_config(config_path, arguments))
        console.rule(f"{label}, trained at L = {arms[-1].data.sequence_length}")
        _launch(config_path, arguments)
    curves = [read_curve(arm, label) for arm, label in zip(arms, POSITIONS.values(), strict=True)]
    draw(curves, output_dir / "plots" / "extrapolation.png")
    report = _report(curves, arms)
    (output_dir / "report.md").write_text(report, encoding="utf-8")
    console.rule("perplexity by context length")
    for line in (markdown_table(curves), *summary(curves)):
        console.print(line, markup=False)
    console.print(f"report and picture: {output_dir}/report.md, {output_dir}/plots/")
    check_effect(curves)


def faster_precision() -> str:
    """bf16 where the processor multiplies in it, else fp32."""
    cpu = torch.device("cpu")
    rates = {name: platform.peak_flops(cpu, platform.DTYPES[name])[0] for name in ("fp32", "bf16")}
    return max(rates, key=lambda name: rates[name])


def summary(curves: list[Curve]) -> list[str]:
    """The findings, one sentence each."""
    alibi, sinusoidal = curves
    length = alibi.trained_length
    longer = [other for other in alibi.perplexities if other > length]
    worst = max(alibi.ratio(other) for other in longer)
    gap = sinusoidal.at_trained_length / alibi.at_trained_length - 1.0
    return [
        f"ALiBi at 2L has {alibi.ratio(2 * length):.3f} times its perplexity at L, and at most "
        f"{worst:.3f} times up to {max(longer) // length}L.",
        f"Sinusoidal at 2L has {sinusoidal.ratio(2 * length):.3f} times its perplexity at L.",
        f"At L itself sinusoidal is {gap:+.1%} from ALiBi ({sinusoidal.at_trained_length:.3f} "
        f"against {alibi.at_trained_length:.3f}): at this size and after so few tokens ALiBi also "
        "learns faster at L; the paper's parity at L comes after far more tokens.",
    ]


def check_effect(curves: list[Curve]) -> None:
    """Raises TrainingError if the runs do not show what the paper found."""
    alibi, sinusoidal = curves
    double = 2 * alibi.trained_length
    holds = (
        alibi.ratio(double) < 1.0
        and max(alibi.ratio(length) for length in alibi.perplexities) <= ALIBI_LIMIT
        and sinusoidal.ratio(double) >= SINUSOIDAL_AT_2L
    )
    if not holds:
        raise TrainingError(
            f"the demo did not show the paper's effect: expected ALiBi below 1 times at 2L and at "
            f"most {ALIBI_LIMIT} times beyond, sinusoidal at least {SINUSOIDAL_AT_2L} times at 2L"
        )


def _launch(config_path: Path, arguments: list[str]) -> None:
    """One training run through the launcher, as a user would start it, with no GPU in sight."""
    launch = [sys.executable, "-m", "launch", "local", str(config_path), *arguments]
    if subprocess.run(["env", "CUDA_VISIBLE_DEVICES=", *launch], check=False).returncode != 0:
        raise TrainingError(f"the demo's run failed: {' '.join(launch)}")


def _report(curves: list[Curve], arms: list[RunConfig]) -> str:
    config = arms[0]
    environment = platform.describe_environment()
    versions = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "host")
    findings = "\n".join(f"- {line}" for line in summary(curves))
    minutes = " and ".join(f"{_minutes(arm):.1f}" for arm in arms)
    return f"""# Train short, test long: the demo

Two models of {config.model.num_layers} layers × {config.model.hidden_size}, trained alike on the
State-of-the-Union speeches for {config.train.steps} steps of {config.tokens_per_step} tokens
(bytes) at L = {curves[0].trained_length}, and scored on the same {curves[0].tokens_scored:,}
held-out tokens, nonoverlapping, at every length.

{markdown_table(curves)}

![Perplexity against context length](plots/extrapolation.png)

{findings}

Training and evaluation took {minutes} minutes, {config.precision}; {versions}. Again: `make demo`.
"""


def _minutes(config: RunConfig) -> float:
    """From a run's first recorded line to its last."""
    lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["time"] - json.loads(lines[0])["time"]) / 60.0

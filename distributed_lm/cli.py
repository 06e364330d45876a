"""The ``distributed-lm`` command line.

Each command imports what it needs when it runs, so that ``--help`` and a mistyped argument are
answered at once, without torch.
"""

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from distributed_lm.checkpoints import Action
from distributed_lm.checkpoints import checkpoints as show_checkpoints
from distributed_lm.config import load_config, parse_lengths
from distributed_lm.errors import Stopped, UserError
from distributed_lm.ledger import ledger as compare_ledgers
from distributed_lm.prepare_data import merge_data, prepare_data

app = typer.Typer(
    help="Train short, test long: ALiBi language models on Megatron and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# These two carry their own options and help, and import their libraries when they run.
app.command()(prepare_data)
app.command()(merge_data)

ConfigPath = Annotated[Path, typer.Argument(help="Config file, or a run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config fields to change: train.steps=100."),
]


class Launcher(str, Enum):
    local = "local"
    slurm = "slurm"


class Stage(str, Enum):
    """Of a study."""

    prepare = "prepare"
    tune = "tune"
    speed = "speed"
    choose = "choose"
    train = "train"
    evaluate = "evaluate"
    report = "report"


class Ranks(str, Enum):
    """That are rehearsed."""

    all = "all"
    sample = "sample"


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train one run, or continue it from its newest checkpoint."""
    run_config = load_config(config, overrides or [])
    _quiet_engines()
    from distributed_lm.train import train as run

    run(run_config)


@app.command()
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder, or a checkpoint in it.")
    ],
    overrides: Overrides = None,
    lengths: Annotated[
        str,
        typer.Option(help="Context lengths in tokens, as 1024,2048. Default: evaluation.lengths."),
    ] = "",
    checkpoint: Annotated[
        int | None, typer.Option(min=0, metavar="STEP", help="Default: the newest.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="nonoverlapping, sliding, context or documents.")
    ] = "nonoverlapping",
    stride: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Between windows that overlap.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Score only this many, evenly spread."),
    ] = None,
    longer_than: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Which documents --protocol documents scores. Default: the longest length.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Score again what has been scored.")] = False,
) -> None:
    """Perplexity of a trained run at several context lengths."""
    chosen = parse_lengths(lengths, "--lengths")
    sampled = [] if sample is None else [f"evaluation.sample_tokens={sample}"]
    _quiet_engines()
    from distributed_lm.evaluate import evaluate as run

    run(
        path,
        chosen,
        checkpoint,
        [*(overrides or []), *sampled],
        protocol=protocol,
        stride=stride,
        longer_than=longer_than,
        force=force,
    )


@app.command()
def export_hf(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder, or a step_… in it.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    overrides: Overrides = None,
) -> None:
    """Write a checkpoint for transformers, and prove that it computes the same."""
    _quiet_engines()
    from distributed_lm.export.outgoing import export_hf as run

    run(source, output, overrides or [])


@app.command()
def import_hf(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="As save_pretrained() wrote it: safetensors.")
    ],
    output: Annotated[Path, typer.Option(metavar="RUN", help="Run folder; must not exist.")],
    overrides: Overrides = None,
) -> None:
    """Make a transformers model a run: to evaluate, and to go on training at any layout."""
    _quiet_engines()
    from distributed_lm.export.incoming import import_hf as run

    run(folder, output, overrides or [])


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option(metavar="NAME", help="File in configs/clusters, or its path.")
    ] = "h100_8x16",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Default: as the cluster file says.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the best layout as a config.")
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also the best layout on 1, 2, 4, … nodes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
) -> None:
    """Predict parameters, memory, speed and cost of a run, and rank its layouts."""
    from distributed_lm.plan import plan as run

    run(config, overrides or [], cluster, nodes, write, scaling, as_json)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Report environment, devices and data of a run, and prove its attention against fp64."""
    run_config = load_config(config, overrides or [])
    _quiet_engines()
    from distributed_lm.check import check as run

    run(run_config)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train short and test long on this machine: ALiBi against sinusoidal, in minutes."""
    from distributed_lm.demo import demo as run

    run(output)


@app.command()
def drill(
    config: ConfigPath,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="How many times a rank is killed.")] = 5,
    resume_layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"KEY=VALUE ..."',
            help="Fields to change on resuming; several of these take turns. Default: none.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the ranks and moments of the kills.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the two runs.")] = Path("runs/drill"),
) -> None:
    """Kill a run again and again on this machine's CPU, and prove that nothing was lost."""
    from distributed_lm.drill.command import drill as run

    run(config, overrides or [], kills, resume_layout or [], seed, output)


@app.command()
def rehearse(
    config: ConfigPath,
    world_size: Annotated[int, typer.Option(min=1, metavar="RANKS", help="Of the whole run.")],
    overrides: Overrides = None,
    ranks: Annotated[
        Ranks, typer.Option(help="Build all ranks, or a few whole replicas of the model.")
    ] = Ranks.sample,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="File in configs/clusters: memory of a device."),
    ] = None,
) -> None:
    """Build the ranks of a large run on this machine, without memory or network, and compare."""
    run_config = load_config(config, overrides or [])
    from distributed_lm.rehearsal.command import rehearse as run

    run(run_config, world_size, ranks is Ranks.all, cluster)


@app.command()
def study(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="File in configs/studies.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the study to change: seeds=[1]."),
    ] = None,
    launcher: Annotated[Launcher, typer.Option(help="Where the runs run.")] = Launcher.local,
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME", help="For slurm: file in configs/clusters.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once on this machine. Default: what fits.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it will cost, run nothing.")
    ] = False,
    stage: Annotated[Stage | None, typer.Option(help="This stage only. Default: all.")] = None,
) -> None:
    """Run a matched set of runs, and judge the paper's claims by them."""
    from distributed_lm.study.command import study as run

    only = stage.value if stage else None
    run(study_file, overrides or [], launcher.value, cluster, jobs, plan, only)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html, report.md and pictures.")],
) -> None:
    """Compare finished runs in tables and pictures."""
    from distributed_lm.study.command import report as run

    run(run_dirs, output)


@app.command()
def checkpoints(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    action: Annotated[
        Action,
        typer.Argument(help="verify reads every byte; prune deletes what retention gives up."),
    ] = Action.list,
) -> None:
    """List, verify or prune the checkpoints of a run."""
    show_checkpoints(run_dir, action)


@app.command()
def ledger(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run folder.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Run folder.")],
) -> None:
    """Say whether two runs saw the same tokens, and the first step where they differ."""
    if not compare_ledgers(first, second):
        raise typer.Exit(1)


def _quiet_engines() -> None:
    """Before the first import of an engine: most of their warnings come while importing."""
    from distributed_lm import platform

    platform.quiet_engines()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake is one sentence; Ctrl-C is exit code 130."""
    try:
        app(None if arguments is None else list(arguments), prog_name="distributed-lm")
    except Stopped as stop:
        typer.echo(str(stop), err=True)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

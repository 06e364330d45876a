"""``python -m launch``: start runs here or on a cluster, and look after them."""

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from distributed_lm.config import parse_lengths
from distributed_lm.errors import UserError
from launch.array import submit_runs
from launch.cluster import load_cluster
from launch.ladder import check
from launch.local import describe, plan_local, run_plan
from launch.script import Wishes
from launch.status import cancel, logs, status
from launch.submit import describe as describe_submission
from launch.submit import plan_submission, submit, test_only
from launch.sync import sync

app = typer.Typer(
    help="Start the processes of a run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Command(str, Enum):
    """Commands of ``distributed-lm`` that run on many processes."""

    train = "train"
    evaluate = "evaluate"
    check = "check"


@app.callback()
def launch() -> None:
    """Start the processes of a run."""


@app.command()
def local(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="Config file; for evaluate, a run folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... [-- ARGUMENTS]",
            help="Config fields to change; after --, arguments of the command itself.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start. Default: tensor x pipeline parallel size."),
    ] = None,
    command: Annotated[Command, typer.Option(help="What each process runs.")] = Command.train,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be started.")
    ] = False,
) -> None:
    """Start a run on this machine, one process per rank."""
    plan = plan_local(
        config,
        overrides=overrides or [],
        processes=processes,
        command=command.value,
        extra_arguments=context.obj or (),
    )
    if dry_run:
        typer.echo(describe(plan))
        return
    raise typer.Exit(run_plan(plan))


@app.command()
def slurm(
    config: Annotated[Path, typer.Argument(help="Config file.")],
    cluster: Annotated[
        str, typer.Option(metavar="NAME", help="File in configs/clusters, or its path.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Config fields to change."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="D-HH:MM:SS", help="Limit of one job.")
    ] = None,
    spare_nodes: Annotated[
        int, typer.Option(min=0, help="Further nodes, to take the place of sick ones.")
    ] = 0,
    chain: Annotated[
        int, typer.Option(min=0, help="Further jobs that go on, where nodes cannot submit any.")
    ] = 0,
    alert: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Run on a crash, hang or restart loop.")
    ] = None,
    mail: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The same, by mail.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the script, submit nothing.")
    ] = False,
) -> None:
    """Submit a run to Slurm; it comes back by itself until it is finished."""
    wishes = Wishes(nodes, time, spare_nodes, chain, alert, mail)
    submission = plan_submission(config, overrides or [], load_cluster(cluster), wishes)
    if dry_run:
        typer.echo(describe_submission(submission))
        verdict = test_only(submission)
        typer.echo(f"# sbatch --test-only: {verdict or 'there is no sbatch here'}")
        return
    job_id = submit(submission)
    run_dir = submission.config.run_dir
    typer.echo(
        f"submitted job {job_id}\n"
        f"log:    {submission.job.log_dir}/slurm-{job_id}.log, then rank_0.log beside it\n"
        f"watch:  python -m launch status {run_dir}\n"
        f"cancel: python -m launch cancel {run_dir}"
    )


@app.command()
def array(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="Config files; fields for all."),
    ],
    cluster: Annotated[
        str, typer.Option(metavar="NAME", help="File in configs/clusters, or its path.")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many runs at once. Default: all.")
    ] = None,
    evaluate: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Evaluate each afterwards, as in 1024,2048.")
    ] = "",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of each run.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="D-HH:MM:SS", help="Limit of one job.")
    ] = None,
) -> None:
    """Submit several runs as one job array, and their evaluations after them."""
    paths = [Path(text) for text in configs if "=" not in text]
    overrides = [text for text in configs if "=" in text]
    lengths = parse_lengths(evaluate, "--evaluate")
    wishes = Wishes(nodes=nodes, time=time)
    for run in submit_runs(paths, overrides, load_cluster(cluster), wishes, limit, lengths):
        then = f", then its evaluations: job {run.evaluations}" if run.evaluations else ""
        typer.echo(f"{run.run_dir}: job {run.job}{then}")


# They carry their own options and help.
for command in (check, status, logs, cancel, sync):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 2 for what the user mistyped, else the failing rank's code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Click drops the "--", and with it the border between overrides and the command's arguments.
    border = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        app(arguments[:border], prog_name="python -m launch", obj=tuple(arguments[border + 1 :]))
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

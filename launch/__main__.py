"""``python -m launch``: start runs here or on a cluster, and look after them."""

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from distributed_lm.config import parse_lengths
from distributed_lm.errors import ConfigError, UserError
from launch.array import array_graph
from launch.cancel import cancel
from launch.cluster import load_cluster
from launch.graph import Graph, load_graph
from launch.ladder import check
from launch.local import describe, plan_local, run_plan
from launch.plan import plan_submission
from launch.script import Wishes
from launch.stages import submit_graph
from launch.status import logs, status
from launch.submit import describe as describe_submission
from launch.submit import submit, test_only
from launch.supervisor.predecessors import title
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


ClusterName = Annotated[
    str, typer.Option("--cluster", metavar="NAME", help="File in configs/clusters, or its path.")
]
Nodes = Annotated[int | None, typer.Option(min=1, help="Nodes that train.")]
Time = Annotated[str | None, typer.Option(metavar="D-HH:MM:SS", help="Limit of one job.")]
SpareNodes = Annotated[
    int, typer.Option(min=0, help="Further nodes, to take the place of sick ones.")
]
Chain = Annotated[
    int, typer.Option(min=0, help="Further jobs that go on, where nodes cannot submit any.")
]
Alert = Annotated[
    str | None, typer.Option(metavar="COMMAND", help="Run on a crash, hang or restart loop.")
]
Mail = Annotated[str | None, typer.Option(metavar="ADDRESS", help="The same, by mail.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="So many tasks of a stage at once. Default: all.")
]


@app.command()
def slurm(
    config: Annotated[Path, typer.Argument(help="Config file.")],
    cluster: ClusterName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Config fields to change."),
    ] = None,
    nodes: Nodes = None,
    time: Time = None,
    spare_nodes: SpareNodes = 0,
    chain: Chain = 0,
    alert: Alert = None,
    mail: Mail = None,
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
    cluster: ClusterName,
    limit: Limit = None,
    evaluate: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Evaluate each afterwards, as in 1024,2048.")
    ] = "",
    report: Annotated[
        bool, typer.Option("--report", help="Compare the runs when all are finished.")
    ] = False,
    nodes: Nodes = None,
    time: Time = None,
    spare_nodes: SpareNodes = 0,
    chain: Chain = 0,
    alert: Alert = None,
    mail: Mail = None,
) -> None:
    """Submit several runs as stages: train, evaluate, report."""
    paths = [Path(text) for text in configs if "=" not in text]
    overrides = [text for text in configs if "=" in text]
    if not paths:
        raise ConfigError(f"{' '.join(configs)}: expected config files before the fields")
    graph = array_graph(paths, overrides, parse_lengths(evaluate, "--evaluate"), report)
    wishes = Wishes(nodes, time, spare_nodes, chain, alert, mail)
    _submit_stages(graph, cluster, wishes, limit)


@app.command()
def stages(
    file: Annotated[Path, typer.Argument(help="YAML or JSON; launch/graph.py explains it.")],
    cluster: ClusterName,
    limit: Limit = None,
    nodes: Nodes = None,
    time: Time = None,
    spare_nodes: SpareNodes = 0,
    chain: Chain = 0,
    alert: Alert = None,
    mail: Mail = None,
) -> None:
    """Submit stages of runs and commands that wait for one another; what is done is left out."""
    wishes = Wishes(nodes, time, spare_nodes, chain, alert, mail)
    _submit_stages(load_graph(file), cluster, wishes, limit)


def _submit_stages(graph: Graph, cluster: str, wishes: Wishes, limit: int | None) -> None:
    submitted = submit_graph(graph, load_cluster(cluster), wishes, limit)
    for stage in submitted:
        for job in stage.done:
            typer.echo(f"{stage.name}: {title(job.slurm_dir)}: finished already, left out")
        for index, job in enumerate(stage.todo):
            typer.echo(f"{stage.name}: {title(job.slurm_dir)}: job {stage.jobs[0]}_{index}")
    if any(stage.jobs for stage in submitted):
        typer.echo(
            f"watch:  python -m launch status RUN [--part PART]\n"
            f"cancel: python -m launch cancel {graph.path}"
        )


# They carry their own options and help.
for command in (check, status, logs, cancel, sync):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 2 for what the user mistyped, else the failing rank's code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Click drops the "--", and with it the border between overrides and the command's arguments.
    border = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        if arguments[border + 1 :] and arguments[0] != "local":
            raise ConfigError(
                f"{' '.join(arguments[border:])}: only local takes arguments after --; give config "
                "fields before it"
            )
        app(arguments[:border], prog_name="python -m launch", obj=tuple(arguments[border + 1 :]))
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""``python -m launch local CONFIG [key=value ...] [-- arguments of the command]``."""

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from distributed_lm.errors import UserError
from launch.local import describe, plan_local, run_plan

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

"""``python -m launch sync``: what nodes without internet recorded, brought to W&B from here."""

from pathlib import Path
from typing import Annotated

import typer


def sync(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until the run has reached its last step.")
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="Between two looks, with --watch.")
    ] = 60,
) -> None:
    """Bring metrics.jsonl of a run to W&B: what is new, each point once, as often as you like."""
    from distributed_lm.tracking.sync import sync as bring

    bring(run_dir, watch, every, say=typer.echo)

"""A report's tables and pictures at W&B, where the runs it is about are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from distributed_lm.config import RunConfig
from distributed_lm.errors import UserError
from distributed_lm.tracking.online import choose_mode
from distributed_lm.tracking.wandb_run import connect


def send_report(
    config: RunConfig, folder: Path, media: Mapping[str, Path], say: Callable[[str], None]
) -> None:
    """Log pictures (PNG) and pages (HTML) to the W&B run of the report's folder, if W&B is on.

    Args:
        config: names the W&B project and run, and says whether W&B is on.
        media: files by their W&B names.
        say: prints one line for the user.
    """
    try:
        mode = choose_mode(config.tracking.wandb)
        if mode == "offline":
            say("W&B: offline; to send the report there, make it again where there is a network")
        if mode != "online":
            return
        run = connect(config, folder, {}, folder, is_training=False)
        run.send_media(media)
        run.finish(0)
        say(f"W&B: {run.url}")
    except Exception as error:  # the report is on disk; no trouble of W&B's takes it away
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"W&B: the report was not sent: {text}")

"""A run that sends itself to W&B while it trains. Nothing that goes wrong there stops training."""

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

from distributed_lm.config import RunConfig
from distributed_lm.errors import UserError
from distributed_lm.tracking import wandb_run
from distributed_lm.tracking.points import Points
from distributed_lm.tracking.uploader_lock import sole_uploader
from distributed_lm.tracking.wandb_run import WandbError, WandbRun, connect

# W&B's client gathers what it is given for as long.
SEND_SECONDS = 15.0

Say = Callable[[str], None]
Mode = Literal["online", "offline", "disabled"]


class OnlineRun:
    """Sends what ``metrics.jsonl`` gets, earlier lives' points that W&B has not got included.

    A thread does it, as training should not wait for W&B, nor for the file to be on disk: W&B must
    not have points that the file could lose with its node, for their numbers would be given again.

    Args:
        held: closed at the end.
    """

    def __init__(self, config: RunConfig, run: WandbRun, held: ExitStack, say: Say) -> None:
        self._config = config
        self._run = run
        self._held = held
        self._say = say
        self._path = config.run_dir / "metrics.jsonl"
        self._points = Points(self._path, run.num_points)
        self._error: Exception | None = None
        self._has_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_until_stopped, daemon=True)
        self._thread.start()

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Nothing to do, as the record is in the file; if sending has failed, now is the time to
        say so."""
        self._report_error()

    def finish(self, exit_code: int = 0) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(wandb_run.FINISH_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            self._error = WandbError("log failed (it takes too long)")
        if self._error is None and not self._has_failed:
            try:
                are_all = self._points.are_all(self._config.train.steps)
                self._run.finish(exit_code, will_go_on=exit_code == 0 and not are_all)
            except WandbError as error:
                self._error = error
        self._report_error()
        self._held.close()

    def _report_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._has_failed = True
            self._say(f"W&B: {_sentence(error)}; {bring_later(self._config.run_dir)}")

    def _send_until_stopped(self) -> None:
        stopped = False
        try:
            while not stopped:
                # Known before the round, so that the last one has everything.
                stopped = self._stop.wait(SEND_SECONDS)
                _flush(self._path)
                self._points.read()
                self._run.send(self._config, self._points)
        except Exception as error:
            self._error = error


def start_wandb_run(config: RunConfig, details: Mapping[str, Any], say: Say) -> OnlineRun | None:
    """Begin or continue the W&B run of the run folder; None where W&B is off, offline or fails.

    Args:
        details: shown beside the config.
        say: prints one line for the user.
    """
    try:
        mode = choose_mode(config.tracking.wandb)
        if mode == "offline":
            say(f"W&B: offline; {bring_later(config.run_dir)}")
        return _start(config, details, say) if mode == "online" else None
    except Exception as error:  # also a broken installation or settings file
        say(f"W&B: {_sentence(error)}; {bring_later(config.run_dir)}")
        return None


def choose_mode(wanted: str) -> Mode:
    """``auto`` follows the user's own ``WANDB_MODE``, else is online where W&B would find a key."""
    for mode in (wanted, wandb_run.wished_mode()):
        if mode in ("online", "offline", "disabled"):
            return cast(Mode, mode)
    return "online" if wandb_run.has_credentials() else "offline"


def bring_later(run_dir: Path) -> str:
    return f"`python -m launch sync {run_dir}` brings metrics.jsonl there"


def _start(config: RunConfig, details: Mapping[str, Any], say: Say) -> OnlineRun:
    held = ExitStack()
    held.enter_context(sole_uploader(config.run_dir, is_training=True))
    try:
        run = connect(config, config.run_dir, details, config.run_dir, is_training=True)
    except BaseException:
        held.close()
        raise
    say(f"W&B: {run.url}")
    return OnlineRun(config, run, held, say)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

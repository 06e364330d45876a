"""Brings the ``metrics.jsonl`` of a run to W&B, from a machine that reaches it.

How often, from how many lives and after what failures does not matter: see ``points.py``. How many
points W&B has is asked of W&B itself, before sending and after, so that nothing has to be
remembered here and a sync can be killed at any moment.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from distributed_lm.config import RunConfig, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.run_lock import LOCK_FILE, STALE_SECONDS
from distributed_lm.tracking.points import Points
from distributed_lm.tracking.uploader_lock import sole_uploader
from distributed_lm.tracking.wandb_run import (
    WandbError,
    WandbRun,
    connect,
    disconnect,
    has_credentials,
    scratch_folder,
)

# W&B's client has failed if its server has got nothing new for as long.
STALL_SECONDS = 60.0
ASK_AGAIN_SECONDS = 1.0
# If nothing follows one of these and nobody is at work, the run has ended by itself.
LAST_WORDS = ("non_finite", "save_failed")

Say = Callable[[str], None]


def sync(run_dir: Path, watch: bool, every_seconds: float, say: Say) -> None:
    """Bring what W&B has not got of a run.

    Args:
        watch: go on until the run has reached ``train.steps``, whatever W&B answers meanwhile.
        every_seconds: between two looks at the file.
        say: prints one line for the user.

    Raises:
        ConfigError: no such run, no key, or another process is sending this run.
        WandbError: if not all points have arrived, without ``watch`` only.
    """
    config = load_config(run_dir)
    path = run_dir / "metrics.jsonl"
    if not watch and _is_empty(path):
        raise ConfigError(f"{path}: nothing there yet; start the run, or wait for it with --watch")
    with sole_uploader(run_dir, is_training=False), scratch_folder() as scratch:
        if not has_credentials():
            raise ConfigError("W&B has no API key here; run `wandb login`, or set WANDB_API_KEY")
        with contextlib.closing(Sync(run_dir, config, scratch, say)) as syncing:
            while not syncing.bring(is_last=not watch):
                time.sleep(every_seconds)


class Sync:
    """The sessions with W&B of one ``sync`` command: one, unless W&B fails."""

    def __init__(self, run_dir: Path, config: RunConfig, scratch: Path, say: Say) -> None:
        self._run_dir = run_dir
        self._config = config
        self._scratch = scratch
        self._say = say
        self._path = run_dir / "metrics.jsonl"
        self._points = Points(self._path)
        self._run: WandbRun | None = None
        self._stored: int | None = None
        """Points that W&B has, as far as it has said."""

    def bring(self, is_last: bool) -> bool:
        """Send what is new; True if that was all there will be.

        Raises:
            WandbError: if it has not all arrived and this was the last time.
        """
        with contextlib.suppress(ConfigError):  # a life that begins is just writing it
            self._config = load_config(self._run_dir)
        try:
            return self._bring(is_last)
        except WandbError as error:
            problem = f"W&B: {error}; {self._missing()}"
            self.close()
            disconnect()
            if is_last:
                raise WandbError(f"{problem}; run the same again") from None
            self._say(f"{problem}; trying again")
            return False

    def close(self) -> None:
        """End the session, if one is open."""
        if self._run is not None:
            with contextlib.suppress(WandbError):
                self._finish(self._run)

    def _bring(self, is_last: bool) -> bool:
        if self._run is None:
            if _is_empty(self._path):
                return is_last
            self._connect()
        assert self._run is not None
        run = self._run
        self._points.read()
        is_last = is_last or self._is_over()
        sent = run.send(self._config, self._points)
        self._confirm(run)
        if is_last:
            self._finish(run)
        if sent or is_last:
            total, step = self._points.total, self._points.last_step
            self._say(f"W&B: {sent} points sent; it has all {total}, up to step {step}")
        return is_last

    def _connect(self) -> None:
        # The details are in the file, and follow with its points.
        self._run = connect(self._config, self._run_dir, {}, self._scratch, is_training=False)
        self._stored = self._run.num_points
        self._points = Points(self._path, self._stored)
        self._say(f"W&B: {self._run.url}")

    def _confirm(self, run: WandbRun) -> None:
        """Wait until W&B's server has every point: its client does not tell if it gave up."""
        deadline = time.monotonic() + STALL_SECONDS
        stored = self._stored or 0
        while stored < self._points.total:
            found = run.count_stored()
            if found > stored:
                stored = self._stored = found
                deadline = time.monotonic() + STALL_SECONDS
            elif time.monotonic() > deadline:
                raise WandbError(f"nothing has arrived for {STALL_SECONDS:.0f} s")
            else:
                time.sleep(ASK_AGAIN_SECONDS)

    def _finish(self, run: WandbRun) -> None:
        self._run = None
        is_ended = self._points.last_record.get("event") in LAST_WORDS and not self._is_at_work()
        is_over = self._is_over()
        run.finish(exit_code=int(is_ended and not is_over), will_go_on=not is_ended and not is_over)

    def _is_over(self) -> bool:
        return self._points.are_all(self._config.train.steps) and not self._is_at_work()

    def _is_at_work(self) -> bool:
        """Whether a process holds the run folder. After the last step an evaluation comes."""
        try:
            age = time.time() - (self._run_dir / LOCK_FILE).stat().st_mtime
        except FileNotFoundError:
            return False
        return age < STALE_SECONDS

    def _missing(self) -> str:
        if self._stored is None:
            self._points.read()
            return f"nothing was sent of the {self._points.total} points in {self._path}"
        missing = max(0, self._points.total - self._stored)
        return f"{missing} of {self._points.total} points in {self._path} are missing"


def _is_empty(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0

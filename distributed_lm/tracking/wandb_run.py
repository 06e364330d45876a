"""A run at W&B, by W&B's own client: the only file that imports it."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distributed_lm.config import RunConfig
from distributed_lm.errors import UserError
from distributed_lm.tracking.points import Points

INIT_TIMEOUT_SECONDS = 30
# At the end W&B uploads what is left; a lost connection must not hold a cluster's nodes for hours.
FINISH_TIMEOUT_SECONDS = 300
# A sync has seen its points arrive by then.
SYNC_FINISH_TIMEOUT_SECONDS = 20
# Whole ones; the client's own pace is 15 s.
SYNC_TRANSMIT_SECONDS = 1
QUERY_TIMEOUT_SECONDS = 30
RUN_ID_FILE = "wandb_run_id"


class WandbError(UserError):
    """W&B cannot be reached, or did not take what it was sent."""

    exit_code = 1


class WandbRun:
    """One session with the W&B run of a run folder, which has as many as the run has lives."""

    def __init__(self, run: Any) -> None:
        self.url: str = run.url
        self.num_points: int = run.starting_step
        """Points that W&B had when the session began."""
        self._run = run
        self._stored: Any = None
        self._num_starts = 0
        # W&B's own step counts points: plot against ours.
        run.define_metric("step")
        for kind in ("train", "evaluation", "event"):
            run.define_metric(f"{kind}/*", step_metric="step")

    def send(self, config: RunConfig, points: Points) -> int:
        """Hand over the points that W&B has not got, and how the run is described now.

        The client uploads them in its own time, and tries again for hours if it must.

        Returns:
            How many they were.

        Raises:
            WandbError: if the client fails, or W&B has points that the file does not know.
        """
        if self.num_points > points.total:
            raise WandbError(
                f"W&B has {self.num_points} points of this run and metrics.jsonl only "
                f"{points.total}: if the file was cut or replaced, delete {RUN_ID_FILE} beside it "
                "to begin a new W&B run"
            )
        before = points.sent
        with _naming_failures("log"):
            for number, row in points.take():
                self._run.log(row, step=number, commit=True)
            if points.sent > before and points.data_digest is not None:
                # A text: W&B shows the newest, not a curve.
                self._run.summary["data_digest"] = points.data_digest
            if len(points.starts) > self._num_starts:
                self._num_starts = len(points.starts)
                described = describe(config, points.details, points.lives)
                self._run.config.update(described, allow_val_change=True)
        return points.sent - before

    def send_media(self, media: Mapping[str, Path]) -> None:
        """Log pictures (PNG) and pages (HTML) by name.

        Raises:
            WandbError: if the client fails.
        """
        with _naming_failures("log"):
            import wandb

            self._run.log(
                {
                    name: wandb.Image(str(path)) if path.suffix == ".png" else wandb.Html(str(path))
                    for name, path in media.items()
                }
            )

    def count_stored(self) -> int:
        """How many points W&B's server has.

        Raises:
            WandbError: if it does not say.
        """
        with _naming_failures("query"):
            if self._stored is None:
                import wandb

                self._stored = wandb.Api(timeout=QUERY_TIMEOUT_SECONDS).run(self._run.path)
            last: int = self._stored.lastHistoryStep  # asks the server each time
        return last + 1

    def finish(self, exit_code: int, will_go_on: bool = False) -> None:
        """Upload what is left and end the session. Idempotent.

        Args:
            exit_code: 0 shows the run as finished, anything else as failed.
            will_go_on: the run has not ended: shown as preempted.

        Raises:
            WandbError: if it takes too long.
        """
        with _naming_failures("finish"):
            if will_go_on:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code or int(will_go_on))


def connect(
    config: RunConfig,
    run_dir: Path,
    details: Mapping[str, Any],
    folder: Path,
    is_training: bool,
) -> WandbRun:
    """Begin or continue the W&B run of a run folder.

    Args:
        details: shown beside the config.
        folder: where the client keeps its own files.
        is_training: False if this process and machine are not the run's and nothing about them
            should be recorded.

    Raises:
        WandbError: no network, a bad key, no disk.
    """
    try:
        with _naming_failures("start"):
            import wandb  # 2 s, and only one process needs it

            run = wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                name=config.name,
                id=run_id(run_dir),
                resume="allow",
                dir=str(folder.resolve()),
                config=describe(config, details, ()),
                mode="online",
                settings=wandb.Settings(
                    # Its own output would tear the progress line; what matters we say ourselves.
                    silent=True,
                    console="off",
                    init_timeout=INIT_TIMEOUT_SECONDS,
                    finish_timeout_raises=True,
                    **(_settings_of_training() if is_training else _settings_of_a_sync()),
                ),
            )
            return WandbRun(run)
    except WandbError:
        disconnect()
        raise


def disconnect() -> None:
    """End W&B's service, which holds on to the id of a run whose session failed."""
    import wandb

    # If the service has died, ending it fails too, and W&B wants to exit with its code.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def describe(
    config: RunConfig, details: Mapping[str, Any], lives: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What W&B calls the config of a run. What is not known is left as W&B has it."""
    more = {"details": dict(details), "slurm": [dict(life) for life in lives]}
    known = {name: value for name, value in more.items() if value}
    return {**config.model_dump(mode="json"), **known}


def run_id(run_dir: Path) -> str:
    """The W&B id of a run folder: made once from its path and time, then read from the folder.

    The path alone would not do: W&B refuses the id of a run that was deleted, and a folder that
    was removed and made again would continue the old run.
    """
    run_dir = run_dir.resolve()
    file = run_dir / RUN_ID_FILE
    if file.exists() and (known := file.read_text(encoding="utf-8").strip()):
        return known
    origin = f"{run_dir} {time.time_ns()}"
    made = hashlib.sha256(origin.encode()).hexdigest()[:16]
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(made + "\n", encoding="utf-8")
    return made


def has_credentials() -> bool:
    """Whether W&B would find a key: in ``WANDB_API_KEY``, an identity token file, its settings or
    netrc. It never asks for one."""
    import wandb

    # Login nodes may have WANDB_MODE=offline for the sake of jobs; then no key is found.
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
    return wandb.login(prompt=False, verify=False)


def wished_mode() -> str | None:
    """The user's own ``WANDB_MODE``."""
    return os.environ.get("WANDB_MODE")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the client's files that is removed afterwards, with all that W&B puts there."""
    known = os.environ.get("WANDB_DIR")
    with tempfile.TemporaryDirectory(prefix="wandb-sync-", ignore_cleanup_errors=True) as folder:
        os.environ["WANDB_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("WANDB_DIR")
            if known is not None:
                os.environ["WANDB_DIR"] = known


def _settings_of_training() -> dict[str, Any]:
    return {"finish_timeout": FINISH_TIMEOUT_SECONDS}


def _settings_of_a_sync() -> dict[str, Any]:
    """Be quick, and record nothing of this machine, which is not the run's."""
    return {
        "finish_timeout": SYNC_FINISH_TIMEOUT_SECONDS,
        "x_file_stream_transmit_interval": SYNC_TRANSMIT_SECONDS,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "disable_git": True,
        "disable_code": True,
    }


@contextlib.contextmanager
def _naming_failures(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, the run and its record go on
        raise WandbError(f"{action} failed ({_cause(error)})") from None


def _cause(error: Exception) -> str:
    """The error's kind and first line, without the key should W&B quote it."""
    text = str(error)
    if key := os.environ.get("WANDB_API_KEY"):
        text = text.replace(key, "(the key)")
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

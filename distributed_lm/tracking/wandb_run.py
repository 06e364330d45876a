"""The W&B run of a run folder. Nothing that goes wrong with W&B stops training."""

import hashlib
import numbers
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from distributed_lm.config import RunConfig

INIT_TIMEOUT_SECONDS = 30
# At the end W&B uploads what is left; a lost connection must not hold a cluster's nodes for hours.
# What was not uploaded stays in the run folder, for `wandb sync`.
FINISH_TIMEOUT_SECONDS = 300
RUN_ID_FILE = "wandb_run_id"

Say = Callable[[str], None]
Mode = Literal["online", "offline"]


class WandbRun:
    """Sends records to W&B, against the step axis; stops sending when W&B fails."""

    def __init__(self, run: Any, say: Say) -> None:
        self._run = run
        self._say = say
        # W&B's own step can only rise, and a resumed run goes back: plot against ours.
        run.define_metric("step")
        for kind in ("train", "evaluation", "event"):
            run.define_metric(f"{kind}/*", step_metric="step")

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        metrics = wandb_metrics(kind, values)
        if self._run is None or not metrics:
            return
        try:
            self._run.log({"step": values.get("step", 0), **metrics})
            if "data_digest" in values:  # a text: W&B shows the newest, not a curve
                self._run.summary["data_digest"] = values["data_digest"]
        except Exception as error:  # whatever it is, training goes on
            self._give_up("log", error)

    def finish(self, exit_code: int = 0) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up("finish", error)

    def _give_up(self, action: str, error: Exception) -> None:
        self._run = None
        self._say(f"W&B: {action} failed ({_cause(error)}); metrics.jsonl goes on without it")


def start_wandb_run(config: RunConfig, details: Mapping[str, Any], say: Say) -> WandbRun | None:
    """Begin or continue the W&B run of the run folder; None where W&B is off or fails.

    Args:
        details: shown beside the config.
        say: prints one line for the user.
    """
    if config.tracking.wandb == "disabled":
        return None
    try:
        for mode in modes_to_try(config.tracking.wandb):
            run = _start(config, details, mode, say)
            if run is not None:
                return run
    except Exception as error:  # a broken installation or settings file
        say(f"W&B: start failed ({_cause(error)}); metrics.jsonl goes on without it")
    return None


def modes_to_try(wanted: str) -> tuple[Mode, ...]:
    """``online``, ``offline``, or the second after the first; empty = nothing.

    ``auto`` follows the user's own ``WANDB_MODE``, else is online where W&B would find a key: in
    ``WANDB_API_KEY``, an identity token file, W&B's settings or netrc. It never asks for one.
    Compute nodes often have the key and no way out, hence the second try.
    """
    if wanted != "auto":
        return (cast(Mode, wanted),)
    chosen = os.environ.get("WANDB_MODE")
    if chosen == "disabled":
        return ()
    if chosen in ("online", "offline"):
        return (cast(Mode, chosen),)
    return ("online", "offline") if _has_credentials() else ("offline",)


def _start(config: RunConfig, details: Mapping[str, Any], mode: Mode, say: Say) -> WandbRun | None:
    try:
        run = _init(config, details, mode)
        started = WandbRun(run, say)
    except Exception as error:  # no network, a bad key, no disk: none is worth the run
        say(f"W&B: {mode} start failed ({_cause(error)})")
        _forget_half_started_run()
        return None
    if mode == "online":
        say(f"W&B: {run.url}")
    else:
        say(f"W&B: offline; send it later with: wandb sync {config.run_dir}/wandb/offline-run-*")
    return started


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


def wandb_metrics(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A record under W&B names: ``train/loss``, ``evaluation/valid/L128/loss``, ``event/resume``.

    Only numbers go there; the rest is in ``metrics.jsonl``.
    """
    if kind == "event":
        return {f"event/{values['event']}": 1}
    prefix, axes = kind, {"step"}
    if kind == "evaluation":
        prefix = f"evaluation/{values['split']}/L{values['length']}"
        axes |= {"length"}
        if values["protocol"] != "nonoverlapping":
            prefix += f"/{values['protocol']}"
    return {
        f"{prefix}/{name}": value
        for name, value in values.items()
        if name not in axes and isinstance(value, numbers.Real)
    }


def _init(config: RunConfig, details: Mapping[str, Any], mode: Mode) -> Any:
    import wandb  # 2 s, and only one rank needs it

    return wandb.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        name=config.name,
        id=run_id(config.run_dir),
        resume="allow",
        dir=str(config.run_dir.resolve()),
        config={**config.model_dump(mode="json"), "details": dict(details)},
        mode=mode,
        settings=wandb.Settings(
            # Its own output would tear the progress line; what matters we say ourselves.
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_SECONDS,
            finish_timeout=FINISH_TIMEOUT_SECONDS,
        ),
    )


def _forget_half_started_run() -> None:
    """End W&B's service: it holds on to the id of a run whose start failed."""
    import wandb

    wandb.teardown()


def _has_credentials() -> bool:
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def _cause(error: Exception) -> str:
    """The error's kind and first line, without the key should W&B quote it."""
    text = str(error)
    if key := os.environ.get("WANDB_API_KEY"):
        text = text.replace(key, "(the key)")
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

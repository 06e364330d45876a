"""The training loop: which batch next, step, record, validate, save. Only sequencing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from distributed_lm.checkpoint.agreement import SaveError, answering, problem_of
from distributed_lm.checkpoint.folders import prune
from distributed_lm.checkpoint.store import Save, newest_verified
from distributed_lm.config import RunConfig
from distributed_lm.data.batches import TrainingData
from distributed_lm.data.ledger import advance
from distributed_lm.errors import Stopped, TrainingError
from distributed_lm.pipeline import split_batch
from distributed_lm.process_groups import ProcessGroups
from distributed_lm.run_lock import RunLock
from distributed_lm.supervision import StopEvaluation, Supervision
from distributed_lm.tracking import Tracker
from distributed_lm.training.engine import NonFiniteError, StepResult, TrainingEngine
from distributed_lm.training.optimizer import learning_rate
from distributed_lm.training.snapshot import begin_snapshot, load_snapshot
from distributed_lm.training.spikes import SpikeDetector
from distributed_lm.training.throughput import Throughput

MAX_REWINDS_IN_A_ROW = 10
# Events that somebody may want to be told of at once.
ALERTS = ("spike", "rewind", "non_finite", "save_failed")


@dataclass
class Progress:
    """Where a run is: what a checkpoint holds beside the engine's tensors."""

    data: dict[str, str]
    """Hash of the training tokens and fingerprint of the tokenizer."""
    data_digest: str
    """Head of the ledger: a hash chain over the blocks of every step so far."""
    step: int = 0
    """Optimizer steps done."""
    data_position: int = 0
    """Steps' worth of blocks consumed; more than ``step`` after a rewind left some out."""
    recent_losses: list[float] = field(default_factory=list)
    """Yardstick of the spike detector."""
    validation_due: bool = False
    """Whether the run was stopped in the middle of validating this step."""


class TrainingLoop:
    """Runs from ``progress`` to ``train.steps``."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        data: TrainingData,
        tracker: Tracker,
        throughput: Throughput,
        progress: Progress,
        validate: Callable[[int], None],
        supervision: Supervision,
        lock: RunLock | None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.groups: ProcessGroups = engine.groups
        self.data = data
        self.tracker = tracker
        self.throughput = throughput
        self.progress = progress
        self.validate = validate
        self.supervision = supervision
        self.lock = lock
        self.saved_step = progress.step
        self.spikes = SpikeDetector(config.train.spike, progress.recent_losses)
        self.rewinds_in_a_row = 0
        self.failed_saves = 0
        self.save: Save | None = None

    def run(self) -> None:
        """Train to the end, with a checkpoint and a validation there.

        Raises:
            TrainingError: non-finite loss or out of memory; the last checkpoint stands.
            Stopped: as the supervisor was asked to; everything is saved.
        """
        steps = self.config.train.steps
        self.supervision.begin()
        if self.progress.validation_due:
            self._validate_and_save()
        self.supervision.phase("train")
        self.throughput.restart()
        with _profiler(self.config, self.groups, self.progress.step) as advance_profiler:
            while self.progress.step < steps:
                result = self._step()
                advance_profiler()
                if self.spikes.is_spike(result.loss) and self._handle_spike(result):
                    continue
                self._record(result)
                if self.save is not None and not self.save.is_writing():
                    self._publish_save()
                with self.throughput.stopped():
                    self._validate_and_save()
                if self.supervision.should_stop() and self.progress.step < steps:
                    self._stop()

    def _step(self) -> StepResult:
        progress, layout = self.progress, self.groups.layout
        blocks = self.data.blocks(progress.data_position)
        batch = self.data.batch(progress.data_position, self.groups.coordinates.data, layout.data)
        self.rate = learning_rate(
            progress.step + 1,
            self.config.optimizer.learning_rate,
            self.config.schedule,
            self.config.train.steps,
        )
        # A spiking batch must not reach the weights, unless spikes are only to be logged.
        leave_out = self.config.train.spike.action in ("skip", "rewind")
        limit = self.spikes.limit if leave_out else float("inf")
        try:
            result = self.engine.train_step(
                split_batch(*batch, self.config.batch.micro_batch_size), self.rate, limit
            )
        except NonFiniteError as error:
            where = f"step {progress.step + 1}: {error}; blocks {blocks}"
            self._event("non_finite", f"stopped before the update, {where}")
            self._publish_save()
            raise TrainingError(
                f"non-finite values at {where}. The weights are those of step {progress.step}; "
                "lower optimizer.learning_rate, or look at that batch"
            ) from None
        progress.step += 1
        progress.data_position += 1
        progress.data_digest = advance(progress.data_digest, blocks)
        self.throughput.step_done()
        self.supervision.worked(self.engine.stopwatch.seconds())
        return result

    def _record(self, result: StepResult) -> None:
        step = self.progress.step
        if step % self.config.train.log_every and step != self.config.train.steps:
            return
        values = {
            "step": step,
            "tokens": step * self.config.tokens_per_step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": self.rate,
            **self.throughput.read(),
            "data_digest": self.progress.data_digest,
        }
        self.tracker.log("train", values)
        self.supervision.note(step=step)

    def _validate_and_save(self) -> None:
        step, progress = self.progress.step, self.progress
        is_last = step == self.config.train.steps
        if is_last or progress.validation_due or _is_due(step, self.config.evaluation.every):
            self._validate(step)
        if is_last or _is_due(step, self.config.checkpoint.save_every):
            self._save(step, wait=is_last)

    def _validate(self, step: int) -> None:
        self.supervision.phase("evaluate")
        try:
            self.validate(step)
        except StopEvaluation:
            self.progress.validation_due = True  # the next life begins with it
            self._stop()
        self.progress.validation_due = False
        self.supervision.phase("train")

    def _stop(self) -> None:
        """Save where the run is, and leave."""
        step = self.progress.step
        self._publish_save()
        if self.saved_step != step or self.progress.validation_due:
            self._save(step, wait=True)
        self._event("stop", f"stopped as asked; a start of the run goes on from step {step}")
        raise Stopped(f"stopped as asked at step {step}, which is saved; start the run to go on")

    def _save(self, step: int, wait: bool) -> None:
        """Start a save, after the one before has been published."""
        self.supervision.phase("save")
        self._check_lock()
        if self.save is not None and self.save.is_writing():
            message = f"the save of step {self.save.step} is still being written: waiting for it"
            self._event("save_wait", message)
        self._publish_save()
        self.progress.recent_losses = list(self.spikes.losses)
        with self._tolerating_failed_saves(wait):
            self.save = begin_snapshot(
                self.engine, self.config.run_dir, step, asdict(self.progress)
            )
        if wait or not self.config.checkpoint.asynchronous:
            self._publish_save(wait)
        self.supervision.phase("train")

    def _check_lock(self) -> None:
        """No save into a folder that another run has taken over."""
        if self.lock is not None:
            with contextlib.suppress(OSError):  # a mount that hangs, which saving will say
                answering(self.lock.check)

    def _publish_save(self, is_last: bool = False) -> None:
        """Wait for the save that is under way, if any, and give it its name."""
        if self.save is None:
            return
        save, self.save = self.save, None
        self.supervision.phase("save")
        self._check_lock()
        with self._tolerating_failed_saves(is_last):
            seconds = save.finish()
            self.failed_saves = 0
            self.saved_step = save.step
            self.rewinds_in_a_row = 0
            self._event("save", f"checkpoint of step {save.step}", **seconds)
            self.supervision.note(saved_step=save.step, save_seconds=seconds["save_seconds"])
            if self.groups.is_first_rank:
                self._prune(save.step)
        self.supervision.phase("train")

    def _prune(self, newest_whole: int) -> None:
        problems: list[str] = []
        silence = problem_of(
            lambda: answering(lambda: problems.extend(prune(self.config, newest_whole)))
        )
        for problem in [*problems, silence]:
            if problem:
                self._event("prune_failed", problem)

    @contextlib.contextmanager
    def _tolerating_failed_saves(self, is_last: bool) -> Iterator[None]:
        """A save that fails is an event, and the next one tries again; not so for ever."""
        try:
            yield
        except SaveError as error:
            self.failed_saves += 1
            limit = self.config.checkpoint.max_failed_saves
            self._event("save_failed", f"{error} (failure {self.failed_saves} of {limit} in a row)")
            if is_last or self.failed_saves >= limit:
                raise SaveError(f"{error}; {self.failed_saves} failed saves in a row") from None

    def _handle_spike(self, result: StepResult) -> bool:
        """Act as configured; True if the run is now at an earlier step."""
        action = self.config.train.spike.action
        step = self.progress.step
        message = f"loss {result.loss:.4f} is above {self.spikes.limit:.4f} at step {step}"
        saved = 0
        if action == "rewind":
            self._publish_save()
            saved = newest_verified(self.config.run_dir, self.groups)[0]
        if not saved:
            done = "update left out" if action in ("skip", "rewind") else "update kept"
            self._event("spike", f"{message}: {done}", loss=result.loss)
            return False
        with self.throughput.stopped():
            self._rewind(saved)
        self._event("rewind", f"{message}: back to step {saved}, without the batches since")
        self.rewinds_in_a_row += 1
        if self.rewinds_in_a_row == MAX_REWINDS_IN_A_ROW:
            raise TrainingError(
                f"{self.rewinds_in_a_row} rewinds to step {saved} in a row: the loss keeps "
                "spiking on new batches too; lower optimizer.learning_rate, or raise "
                f"train.spike.threshold={self.config.train.spike.threshold}"
            )
        return True

    def _rewind(self, step: int) -> None:
        """Load checkpoint ``step`` and go on with the data after the spike (PaLM, §5.1)."""
        data_position = self.progress.data_position
        self.progress = restore_progress(load_snapshot(self.engine, self.config.run_dir, step))
        self.progress.data_position = data_position
        self.spikes = SpikeDetector(self.config.train.spike, self.progress.recent_losses)

    def _event(self, name: str, message: str, **extra: Any) -> None:
        values = {"event": name, "step": self.progress.step, "message": message, **extra}
        self.tracker.log("event", values)
        if name in ALERTS:
            self.supervision.alert(name, message)


def restore_progress(state: dict[str, Any]) -> Progress:
    """From a checkpoint's state."""
    names = Progress.__dataclass_fields__
    return Progress(**{name: state[name] for name in names if name in state})


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


@contextlib.contextmanager
def _profiler(
    config: RunConfig, groups: ProcessGroups, steps_done: int
) -> Iterator[Callable[[], None]]:
    """A torch profiler over the chosen steps; yields what to call after each step."""
    profile = config.train.profile
    if profile.start_step <= steps_done:
        yield lambda: None
        return
    path = config.run_dir / "logs" / f"profile_rank_{groups.process.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(
        wait=profile.start_step - 1 - steps_done, warmup=0, active=profile.steps, repeat=1
    )
    with torch.profiler.profile(
        schedule=schedule,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step

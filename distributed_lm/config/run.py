"""The schema of one run: what may stand in a config file, with units and the meaning of "off"."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field

from distributed_lm.config.model import (
    Count,
    CountOrOff,
    Fraction,
    ModelConfig,
    NonNegativeFloat,
    PositiveFloat,
    Section,
)

# A run's name becomes a folder, a Slurm job name and a W&B run name: nothing a shell could read.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class WeightedPath(Section):
    path: str
    """Folder written by ``prepare-data``."""
    weight: PositiveFloat = 1.0
    """Share of the blocks drawn from this corpus, relative to the others' weights."""


class DataConfig(Section):
    path: str | Annotated[tuple[WeightedPath, ...], Field(min_length=1)]
    """Folder written by ``prepare-data``, or a list of ``{path, weight}`` to blend."""
    sequence_length: Count
    """Tokens per training sequence."""
    block_length: Count | None = None
    """Tokens per shuffled block; sequences are cut inside blocks. Give runs that are to see the
    same tokens the same value, a multiple of each one's sequence length. Off = sequence length."""
    cache_path: str | None = None
    """Folder for shuffle indices; off = ``index_cache`` inside each data set."""

    @property
    def block_size(self) -> int:
        return self.block_length or self.sequence_length

    @property
    def corpora(self) -> tuple[WeightedPath, ...]:
        return (WeightedPath(path=self.path),) if isinstance(self.path, str) else self.path


class BatchConfig(Section):
    global_batch_size: Count
    """Sequences per optimizer step, over all data-parallel ranks."""
    micro_batch_size: Count = 1
    """Sequences per forward pass of one data-parallel rank."""


class ParallelConfig(Section):
    tensor: Count = 1
    """Tensor-parallel size: ranks that share every layer."""
    pipeline: Count = 1
    """Pipeline-parallel size: ranks that each hold some of the layers."""
    virtual_pipeline: Count = 1
    """Model chunks per pipeline rank (interleaved schedule); 1 = off."""
    sequence: bool = False
    """Sequence parallelism: norms and residual stream split over the tensor-parallel ranks."""
    timeout_seconds: Count = 600
    """A collective that takes longer than this ends the run."""


class ZeroConfig(Section):
    stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO: 0 = plain, 1 shards optimizer state, 2 also gradients, 3 also weights."""


class SpikeConfig(Section):
    action: Literal["ignore", "log", "skip", "rewind"] = "log"
    """On a loss spike: nothing; an event; an event and no update from that batch; or back to the
    last checkpoint, leaving out the batches since."""
    window: Count = 64
    """Steps whose median loss is the yardstick; nothing is judged before that many steps."""
    threshold: PositiveFloat = 1.0
    """Nats per token above the running median that count as a spike."""


class ProfileConfig(Section):
    start_step: CountOrOff = 0
    """First step to trace; 0 = off."""
    steps: Count = 3
    """Steps to trace."""


class TrainConfig(Section):
    steps: Count
    """Optimizer steps. May be raised when a run is resumed."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to recompute in backward: none, the core attention, or whole layers."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoder layers (``torch.compile``); ``auto`` does so on a GPU, where it can."""
    log_every: Count = 1
    """Steps between lines in ``metrics.jsonl`` and W&B."""
    spike: SpikeConfig = SpikeConfig()
    """What to do when the loss jumps."""
    profile: ProfileConfig = ProfileConfig()
    """Torch profiler trace of chosen steps, into the run folder."""


class OptimizerConfig(Section):
    kind: Literal["adamw", "nag"] = "adamw"
    """AdamW, or Nesterov's accelerated gradient as fairseq has it."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """For matrices, not through the gradient (decoupled); biases and norms are never decayed."""
    momentum: Fraction = 0.99
    """``nag`` only: decay of the accumulated gradient."""
    beta1: Fraction = 0.9
    """``adamw`` only: decay of the first moment."""
    beta2: Fraction = 0.95
    """``adamw`` only: decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """``adamw`` only: added to the root of the second moment."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 = off."""


class ScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine", "cosine_restarts", "inverse_sqrt", "wsd"] = (
        "cosine"
    )
    """Shape after warm-up; ``wsd`` holds the peak, then decays linearly (warmup-stable-decay);
    ``cosine_restarts`` is fairseq's ``cosine`` (warm restarts, Loshchilov and Hutter 2017)."""
    warmup_steps: CountOrOff = 0
    """Steps of linear rise from 0 to the peak."""
    warmup_start_ratio: Fraction = 0.0
    """``cosine_restarts`` only: learning rate of the first step, as a fraction of the peak."""
    period_steps: Count | None = None
    """``cosine_restarts`` only: steps from the end of warm-up to the first restart; off = all that
    are left."""
    period_multiplier: Annotated[float, Field(ge=1.0)] = 1.0
    """``cosine_restarts`` only: each period is this many times as long as the one before."""
    period_shrink: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """``cosine_restarts`` only: peak and floor of each period are these times those before."""
    total_steps: Count | None = None
    """Step at which the decay ends; off = ``train.steps``."""
    decay_steps: Count | None = None
    """``wsd`` only: length of the final decay; off = a tenth of the total."""
    minimum_ratio: Fraction = 0.0
    """Final learning rate as a fraction of the peak."""


class AttentionConfig(Section):
    backend: Literal["auto", "reference", "sdpa", "matmul", "flex", "flash"] = "auto"
    """``auto`` takes FlexAttention on CUDA for methods with a bias, batched matrix products
    (``matmul``) on a CPU in bf16; else scaled-dot-product attention."""


class EvaluationConfig(Section):
    every: CountOrOff = 0
    """Steps between validation passes during training; 0 = only at the end."""
    lengths: tuple[Count, ...] = ()
    """Context lengths to score, in tokens; off = the trained length."""
    split: Literal["train", "valid", "test"] = "valid"
    """Which part of the data set is scored."""
    max_tokens: CountOrOff = 0
    """Score at most this many tokens from the start of the split; 0 = all."""
    sample_tokens: CountOrOff = 0
    """Score only this many tokens, spread over the split, as a subsample; 0 = all of them (1024 for
    the protocol ``context``, which scores each many times)."""
    sample_seed: CountOrOff = 0
    """Which tokens are sampled. Runs to be compared need the same."""
    tokens_per_batch: Count = 16384
    """Tokens per forward pass of one data-parallel rank: bounds memory."""


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online where a key is found, else offline with a line saying so."""
    project: str = "distributed_lm"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; off = the logged-in user."""


class CheckpointConfig(Section):
    save_every: CountOrOff = 0
    """Steps between checkpoints; 0 = only at the end."""
    asynchronous: bool = True
    """Write checkpoints in forked processes while training goes on; the last one is waited for."""
    keep_last: CountOrOff = 0
    """Newest checkpoints to keep; 0 = all. The newest is never deleted."""
    keep_every: CountOrOff = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 = none."""
    save_timeout_seconds: Count = 1800
    """A save that takes longer than this has failed: its file system hangs."""
    max_failed_saves: Count = 3
    """Failed saves in a row after which the run stops; until then it goes on and tries again."""
    resume: bool = True
    """Continue from the newest checkpoint in the run folder; off = refuse to start over it."""


class SupervisionConfig(Section):
    hang_timeout_seconds: Count = 600
    """Under Slurm: a run in which no rank takes a step for this long (or for twenty steps' time,
    if that is longer), or a rank does not come up, hangs, and is started again. Ten times as long
    while it starts, saves or evaluates."""
    max_restarts_without_progress: CountOrOff = 3
    """Restarts in a row without a new checkpoint after which the run stops."""


class RunConfig(Section):
    """Everything that determines a run."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Names the run folder, the W&B run and the Slurm job."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Initial weights and data order follow from it."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Weights and activations; bf16 and fp16 keep fp32 master weights and accumulate in fp32."""
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    attention: AttentionConfig = AttentionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @pydantic.model_validator(mode="after")
    def _size_learned_table(self) -> "RunConfig":
        """Now, so that the run's ``config.yaml`` tells a later evaluation at any length."""
        if self.model.position == "learned" and self.model.max_positions is None:
            rows = {"max_positions": self.data.sequence_length}
            self.__dict__["model"] = self.model.model_copy(update=rows)
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.data.sequence_length

    @property
    def evaluation_lengths(self) -> tuple[int, ...]:
        """Context lengths to score: as configured, or the trained one."""
        return self.evaluation.lengths or (self.data.sequence_length,)

    def with_whole_model(self) -> "RunConfig":
        """The same with the model unsplit, as one process can build it."""
        whole = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False}
        return self.model_copy(update={"parallel": self.parallel.model_copy(update=whole)})

    def to_yaml(self) -> str:
        """The resolved config as YAML: loading it again gives the same config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

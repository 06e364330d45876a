"""The schema of one run: what may stand in a config file, with units and the meaning of "off".

``load_config`` merges the files a config ``extends``, the config itself and dotted overrides,
rejects unknown keys, and runs every check that needs more than one field. Imports no torch.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from distributed_lm.errors import ConfigError
from distributed_lm.layout import check_layout

Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
DropoutRate = Annotated[float, Field(ge=0.0, lt=1.0)]

# Overrides that build the model unsplit: evaluation is not bound to the layout of training.
WHOLE_MODEL_LAYOUT = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
)

# The relative bias of T5 (Raffel et al. 2020, §2.1): buckets of distances, and the distance from
# which on all share the last.
T5_BUCKETS = 32
T5_MAX_DISTANCE = 128

# Fields that one kind alone reads, and that kind: set for another they would silently do nothing.
SCHEDULE_FIELDS = {
    "decay_steps": "wsd",
    "warmup_start_ratio": "cosine_restarts",
    "period_steps": "cosine_restarts",
    "period_multiplier": "cosine_restarts",
    "period_shrink": "cosine_restarts",
}
OPTIMIZER_FIELDS = {"momentum": "nag", "beta1": "adamw", "beta2": "adamw", "epsilon": "adamw"}

# A run's name becomes a folder, a Slurm job name and a W&B run name: nothing a shell could read.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(pydantic.BaseModel):
    """One block of a config file. Unknown keys are errors; values do not change after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class AdaptiveConfig(Section):
    """Words in bands by frequency, rarer ones narrower (Baevski and Auli 2019), tied with an
    adaptive softmax over the same bands (Grave et al. 2017). Token ids must be sorted by frequency,
    as ``prepare-data --tokenizer words`` does."""

    cutoffs: Annotated[tuple[Count, ...], Field(min_length=1)]
    """First token id of every band after the first, ascending."""
    factor: Annotated[int, Field(ge=2)] = 4
    """A band's embeddings are this many times narrower than those of the band before it."""
    dropout: DropoutRate = 0.0
    """In the softmax: of its input, and of each projection of it; off = 0."""

    def band_sizes(self, vocab_size: int) -> list[int]:
        """Words of each band."""
        edges = (0, *self.cutoffs, vocab_size)
        return [stop - start for start, stop in pairwise(edges)]

    def band_widths(self, hidden_size: int) -> list[int]:
        """Width of each band's embeddings."""
        return [hidden_size // self.factor**band for band in range(len(self.cutoffs) + 1)]


class DropoutConfig(Section):
    """Share of values that are zeroed in training; off = 0."""

    hidden: DropoutRate = 0.0
    """Of the embeddings, and of what each block adds to the residual stream."""
    attention: DropoutRate = 0.0
    """Of the attention weights."""
    activation: DropoutRate = 0.0
    """Inside the feed-forward block, after the activation."""


class ModelConfig(Section):
    num_layers: Count
    """Decoder layers."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads; must divide ``hidden_size``."""
    num_key_value_heads: Count | None = None
    """Key and value heads (grouped-query attention); off = one per query head."""
    ffn_hidden_size: Count | None = None
    """Width inside the feed-forward block; off = 4 × ``hidden_size``."""
    vocab_size: Count | None = None
    """Rows of the embedding; off = the data set's vocabulary, padded to a multiple of 64."""
    position: str = "alibi"
    """``alibi``, ``sinusoidal``, ``rotary``, ``t5``, ``learned``, ``none``, or
    ``package.module:Class`` of your own position method."""
    max_positions: Count | None = None
    """Longest input the model accepts, in tokens, and the rows of ``learned``'s table; off = any
    length, or for ``learned`` the trained one."""
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "gelu"
    """``gelu`` is the exact (erf) one, ``gelu_tanh`` its approximation."""
    bias: bool = True
    """Additive biases in the linear layers and in LayerNorm; off = none anywhere."""
    tie_embeddings: bool = True
    """The output projection is the input embedding."""
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Applied before each block and once at the end (pre-norm)."""
    final_norm: bool = True
    """The norm at the end; off = the last block's output goes to the output projection as it is."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get
    this divided by √(2 × num_layers)."""
    initialization: Literal["normal", "fairseq"] = "normal"
    """Initial weights: normal with ``init_std``, or by fairseq's rules, which need no number."""
    adaptive: AdaptiveConfig | None = None
    """Adaptive embedding and softmax; off = one matrix for all words."""
    dropout: DropoutConfig = DropoutConfig()
    """Dropout rates while training."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size


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
    backend: Literal["auto", "reference", "sdpa", "flex", "flash"] = "auto"
    """``auto`` takes FlexAttention on CUDA and scaled-dot-product attention on CPU."""


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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run's config.

    Args:
        path: YAML file, or a run folder that holds ``config.yaml``.
        overrides: ``section.field=value`` strings, in YAML syntax after the ``=``.

    Raises:
        ConfigError: naming the field or file, what was found, and what to do.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    merged = OmegaConf.merge(_read_with_parents(path, ()), _parse_overrides(overrides))
    try:
        values = OmegaConf.to_container(merged, resolve=False)
        _refuse_interpolation(values, path)
        config = RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    check_config(config)
    return config


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run folder, with the model unsplit and the folder where it is now.

    Raises:
        ConfigError: if ``run`` is no run folder, or as ``load_config``.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: not a run folder (it has no config.yaml); give the folder that train wrote, "
            "as in runs/smoke"
        )
    config = load_config(run, [*WHOLE_MODEL_LAYOUT, *overrides])
    # The folder may have been moved since the config was written into it.
    place = run.resolve()
    return config.model_copy(update={"output_dir": str(place.parent), "name": place.name})


def longest_input(config: RunConfig) -> int | None:
    """Longest sequence that the model takes, in tokens; None = any. Past it there is nothing to
    score: the model has no embedding for such a position."""
    return config.model.max_positions


def check_config(config: RunConfig) -> None:
    """Reject values that contradict each other, whatever the world size.

    Raises:
        ConfigError: naming the fields, both numbers and the remedy.
    """
    _check_model(config.model)
    _check_lengths(config)
    check_layout(config)
    _check_only_for(config.schedule, "schedule", SCHEDULE_FIELDS)
    _check_only_for(config.optimizer, "optimizer", OPTIMIZER_FIELDS)
    if config.precision != "fp32" and config.zero.stage == 0:
        raise ConfigError(
            f"zero.stage=0 keeps no fp32 master weights for precision={config.precision}; "
            "set zero.stage=1 (or precision=fp32)"
        )
    if config.precision == "fp16" and config.parallel.pipeline > 1:
        raise ConfigError(
            f"precision=fp16 with parallel.pipeline={config.parallel.pipeline} is not supported: "
            "the loss scale is known only to the last stage; set precision=bf16"
        )
    if config.zero.stage >= 2 and config.parallel.pipeline > 1:
        raise ConfigError(
            f"zero.stage={config.zero.stage} with parallel.pipeline={config.parallel.pipeline} "
            "gives wrong gradients, since it reduces before the pipeline has accumulated them; "
            "set zero.stage=1"
        )


def parse_lengths(text: str, option: str) -> tuple[int, ...]:
    """``"1024,2048"`` as numbers; empty text is no lengths.

    Args:
        option: of the command line, for the message.

    Raises:
        ConfigError: on anything but positive whole numbers with commas between them.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{option}={text}: expected whole numbers of tokens with commas between them, "
            f"as in {option} 1024,2048"
        )
    return tuple(int(part) for part in parts)


def _check_only_for(section: Any, name: str, kinds: dict[str, str]) -> None:
    """Reject a field that is set although the section's ``kind`` does not read it."""
    for field, kind in kinds.items():
        value = getattr(section, field)
        if value != type(section).model_fields[field].default and section.kind != kind:
            raise ConfigError(
                f"{name}.{field}={value} has a meaning for {name}.kind={kind} only, "
                f"found {section.kind}; leave it out"
            )


def _check_model(model: ModelConfig) -> None:
    heads = model.num_attention_heads
    if model.hidden_size % heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of "
            f"model.num_attention_heads={heads}; choose a head count that divides it"
        )
    if heads % model.key_value_heads:
        raise ConfigError(
            f"model.num_attention_heads={heads} is not a multiple of "
            f"model.num_key_value_heads={model.num_key_value_heads}; choose a divisor of {heads}"
        )
    if model.adaptive is not None:
        _check_adaptive(model, model.adaptive)


def _check_adaptive(model: ModelConfig, adaptive: AdaptiveConfig) -> None:
    edges = [*adaptive.cutoffs, *([model.vocab_size] if model.vocab_size else [])]
    if any(after <= before for before, after in pairwise(edges)):
        raise ConfigError(
            f"model.adaptive.cutoffs={list(adaptive.cutoffs)} with model.vocab_size="
            f"{model.vocab_size}: expected ascending numbers below the vocabulary's size"
        )
    narrowest = adaptive.factor ** len(adaptive.cutoffs)
    if model.hidden_size % narrowest:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.adaptive.factor="
            f"{adaptive.factor} to the power of {len(adaptive.cutoffs)} cutoffs = {narrowest}, by "
            "which the rarest words' embeddings are narrower; choose a multiple or fewer cutoffs"
        )
    if not model.tie_embeddings:
        raise ConfigError(
            "model.tie_embeddings=false: model.adaptive ties its input and output embeddings "
            "always; set model.tie_embeddings=true"
        )


def _check_lengths(config: RunConfig) -> None:
    length, block = config.data.sequence_length, config.data.block_size
    limit = longest_input(config)
    if limit is not None and length > limit:
        raise ConfigError(
            f"data.sequence_length={length} is longer than model.max_positions={limit}; "
            "shorten the sequences or raise model.max_positions"
        )
    if block % length:
        raise ConfigError(
            f"data.block_length={block} is not a multiple of data.sequence_length={length}; "
            f"use {length * max(1, round(block / length))}"
        )
    if config.tokens_per_step % block:
        raise ConfigError(
            f"batch.global_batch_size={config.batch.global_batch_size} sequences of "
            f"{length} tokens do not fill whole blocks of data.block_length={block}; "
            f"use a multiple of {block // length} sequences"
        )


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> Any:
    """A YAML file over the files it ``extends`` (paths relative to it), the first at the bottom."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: extends itself; remove one of the files from 'extends'")
    try:
        values = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such config file; configs/runs/ has some to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: expected 'key: value' lines, found a list")
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str | int) else parents
    if parents is None or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends={parents}: expected a file name or a list of them")
    chain = (*children, path.resolve())
    layers = [_read_with_parents(path.parent / parent, chain) for parent in parents]
    return OmegaConf.merge(*layers, values)


def _refuse_interpolation(values: Any, path: Path, field: str = "") -> None:
    """OmegaConf could fill ``${oc.env:NAME}`` in, and a secret would end up in the run folder."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            _refuse_interpolation(value, path, f"{field}.{key}" if field else str(key))
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(f"{path}: {field}={values}: ${{}} is not filled in; write the value")


def _parse_overrides(overrides: Sequence[str]) -> Any:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(
                f"override {override!r}: expected section.field=value, as in train.steps=100"
            )
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides {list(overrides)}: {_one_line(error)}") from None


def _first_problem(error: pydantic.ValidationError) -> str:
    """One pydantic problem as 'field: what was found, what was expected'."""
    problem = error.errors()[0]
    field = _in_quotes(
        ".".join(str(part) for part in problem["loc"] if part not in ("str", "tuple"))
    )
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such field; check the spelling (config.py lists them all)"
    if problem["type"] == "missing":
        return f"{field}: missing; add it to the file or as {field}=… on the command line"
    found = _in_quotes(str(problem["input"])[:60])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field}={found}: {message}"


def _in_quotes(text: str) -> str:
    """As it is, unless that would break the line or hide something in it."""
    return text if text.isprintable() else repr(text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

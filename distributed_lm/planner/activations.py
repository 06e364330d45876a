"""Bytes that one microbatch leaves in memory for backward, layer by layer.

Counted from what the modules that we build save (Megatron-core's layers without its fusions,
``model/core_attention.py``): Korthikanti et al. 2022, *Reducing Activation Recomputation*, §4, does
the same for Megatron's fused layers and gives 34·S·B·D + 5·N·S²·B bytes; ours has no dropout masks
and no matrix of scores. Letters: S sequence, B batch, D hidden, N heads, F feed-forward width.
"""

from dataclasses import dataclass
from typing import Literal

from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout

Device = Literal["cpu", "cuda"]
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Of model/loss.py, which imports torch: logits kept at once, and the fewest rows of a chunk.
MAX_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
MIN_ROWS = 256
# Of model/attention_backends.py: queries of one call to SDPA on a CPU.
CPU_QUERIES = 192


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors that recur, on one tensor-parallel rank, of one microbatch."""

    tokens: int
    """S·B."""
    stream: float
    """The residual stream [S, B, D]; with sequence parallelism this rank's slice of S."""
    whole_stream: float
    """[S, B, D] whatever the slice."""
    head_stream: float
    """[S, B, D of this rank's heads]."""
    key_value: float
    """Keys and values together."""
    ffn: float
    """[S, B, F of this rank]."""
    scores: float
    """fp32 [B, N of this rank, S, S]."""
    log_sums: float
    """fp32 [B, N of this rank, S]: what fused attention keeps of the scores."""
    item: int
    """Bytes of one element of weights and activations."""

    @classmethod
    def of(cls, config: RunConfig, layout: Layout) -> "Sizes":
        model, tensor = config.model, layout.tensor
        item, length = WEIGHT_BYTES[config.precision], config.data.sequence_length
        tokens = length * config.batch.micro_batch_size
        heads = model.num_attention_heads / tensor
        whole = tokens * model.hidden_size * item
        return cls(
            tokens=tokens,
            stream=whole / tensor if layout.sequence else whole,
            whole_stream=whole,
            head_stream=whole / tensor,
            key_value=2 * tokens * model.key_value_heads * model.head_dim * item / tensor,
            ffn=tokens * model.ffn_size * item / tensor,
            scores=4.0 * tokens * length * heads,
            log_sums=4.0 * tokens * heads,
            item=item,
        )


def layer_bytes(config: RunConfig, layout: Layout, device: Device) -> float:
    """What one layer keeps until its backward, without recomputation of whole layers."""
    sizes, model = Sizes.of(config, layout), config.model
    streams = 4.0  # what goes into both norms, and what comes out
    if model.normalization == "rmsnorm":  # unfused, in fp32: what goes in, and that times 1/rms
        streams = 6.0 if sizes.item == 4 else 2 + 4 * 4 / sizes.item
    residual = streams * sizes.stream
    if model.activation == "swiglu":  # both halves as one, gate, its activation, the product
        feed_forward = 2 * sizes.ffn + 3 * sizes.ffn
    else:  # relu is undone from its output
        feed_forward = (1 if model.activation == "relu" else 2) * sizes.ffn
    kept = residual + feed_forward + attention_bytes(config, layout, device)
    if model.dropout.hidden:  # masks: of what attention and feed-forward add
        kept += 2 * sizes.stream * _mask_share(sizes, device)
    if model.dropout.activation:  # a mask, and what is left besides what came in
        kept += sizes.ffn * (_mask_share(sizes, device) + (model.activation == "relu"))
    return kept


def attention_bytes(config: RunConfig, layout: Layout, device: Device) -> float:
    """Of one layer, from the fused query-key-value product to the output projection's input."""
    sizes, model = Sizes.of(config, layout), config.model
    kept = 2 * sizes.head_stream + sizes.key_value  # query, context; keys and values
    if model.position == "rotary":
        kept += sizes.head_stream + sizes.key_value / 2
    elif model.key_value_heads != model.num_attention_heads:  # queries are copied out
        kept += sizes.head_stream
    if config.train.recompute == "selective":
        return kept
    return kept + core_attention_bytes(config, layout, device)


def core_attention_bytes(config: RunConfig, layout: Layout, device: Device) -> float:
    """What the kernel keeps beside queries, keys, values and context."""
    sizes, model = Sizes.of(config, layout), config.model
    backend = attention_backend(config, device)
    copies = sizes.head_stream + sizes.key_value  # of queries, keys and values
    # Keys and values are repeated for every query head; the fused product and rotated keys let go.
    is_grouped = model.key_value_heads != model.num_attention_heads
    let_go = sizes.key_value * (1.5 if model.position == "rotary" else 1.0)
    repeated = sizes.head_stream - let_go if is_grouped else 0.0
    if backend == "reference":
        scores = sizes.scores * (3 if model.dropout.attention else 1)
        # In fp32: 16-bit queries, keys and values are let go for their copies.
        return scores + (copies * (4 / sizes.item - 1) if sizes.item < 4 else repeated)
    if backend == "matmul":
        return repeated
    has_gradient_bias = model.position == "t5" and backend == "sdpa"
    if has_gradient_bias or (model.dropout.attention and device == "cpu"):
        # No fused kernel: torch computes the scores, and keeps them.
        return sizes.scores * (3 if model.dropout.attention else 1) + copies * (
            2 / 3 if sizes.item == 4 else 1
        )
    if backend == "sdpa" and device == "cuda" and has_bias(config):  # it computes in fp32 then
        return (copies + sizes.head_stream) * 4 / sizes.item + sizes.log_sums
    is_cut = backend == "sdpa" and device == "cpu"
    if is_cut and config.data.sequence_length > CPU_QUERIES:  # what the chunks' context is made of
        return sizes.log_sums + sizes.head_stream
    return sizes.log_sums


def has_bias(config: RunConfig) -> bool:
    """Whether the position method adds to the scores; of a user's own, we assume it."""
    return config.model.position not in ("sinusoidal", "rotary", "learned", "none")


def attention_backend(config: RunConfig, device: Device) -> str:
    """What ``model/backend_choice.py`` chooses; a user's own bias we assume to be untrained, and
    FlexAttention to take it."""
    if config.attention.backend != "auto":
        return config.attention.backend
    if config.model.dropout.attention:
        return "sdpa"
    if device == "cuda":
        return "flex" if has_bias(config) else "sdpa"
    fits = config.precision == "bf16" and config.model.position != "t5"
    return "matmul" if fits else "sdpa"


def bias_bytes(config: RunConfig, layout: Layout, device: Device) -> float:
    """The bias with its causal mask, fp32 [N, S, S], or without a bias [1, S, S], that all layers
    of a stage share. Kernels on a GPU compute it instead, or are causal by themselves."""
    backend = attention_backend(config, device)
    is_causal_itself = backend == "sdpa" and device == "cuda" and not has_bias(config)
    if backend in ("flex", "flash") or is_causal_itself:
        return 0.0
    heads = config.model.num_attention_heads / layout.tensor if has_bias(config) else 1
    return 4.0 * heads * config.data.sequence_length**2


def loss_bytes(config: RunConfig, layout: Layout, vocab_size: int, device: Device) -> float:
    """While the last stage computes the loss and, in the same pass, its gradients by the hidden
    states and by the output weight (``model/loss.py``): a chunk's logits, in fp32 too, and the
    weight's gradient, summed in fp32 if there is more than one chunk."""
    sizes, columns = Sizes.of(config, layout), vocab_size // layout.tensor
    if config.model.adaptive is not None:
        columns = config.model.adaptive.cutoffs[0] // layout.tensor
        return sizes.tokens * columns * (4 + sizes.item + 4)
    most = max(MIN_ROWS, MAX_LOGITS[device] // columns)
    chunks = -(-sizes.tokens // most)
    rows = -(-sizes.tokens // chunks)
    logits = rows * columns * (4 if sizes.item == 4 else 4 + sizes.item)
    if chunks > 1:  # the gradient by the logits of the chunk before is let go only afterwards
        logits += rows * columns * sizes.item
    weight = columns * config.model.hidden_size
    gradient = weight * (sizes.item if chunks == 1 else 4 + sizes.item)
    return logits + gradient + 2 * sizes.whole_stream


def output_gradient_bytes(config: RunConfig, layout: Layout, vocab_size: int) -> float:
    """The output weight's gradient, which waits for the embedding's if they are one weight."""
    columns = vocab_size // layout.tensor
    return columns * config.model.hidden_size * WEIGHT_BYTES[config.precision]


def backward_bytes(config: RunConfig, layout: Layout) -> float:
    """Gradients in flight in the backward of one layer: into and out of the activation function."""
    sizes = Sizes.of(config, layout)
    wide = 3 if config.model.activation == "swiglu" else 2
    return wide * sizes.ffn + 2 * sizes.whole_stream


def _mask_share(sizes: Sizes, device: Device) -> float:
    """Of a dropout mask's bytes in its values': a byte on a GPU, as wide as they on a CPU."""
    return 1.0 if device == "cpu" else 1 / sizes.item

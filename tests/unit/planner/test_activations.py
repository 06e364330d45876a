"""What one layer keeps for backward: every saved tensor counted, against the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model import attention_backends, loss
from distributed_lm.model.gpt import build_stages
from distributed_lm.planner import activations
from distributed_lm.planner.activations import Sizes, bias_bytes, layer_bytes
from distributed_lm.process_groups import Process
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, random_microbatches, tiny_config

LONE = Layout(1, 1, 1, 1, False)
SHAPE = {"hidden_size": 256, "num_attention_heads": 4}
DROPOUT = {"hidden": 0.1, "attention": 0.1, "activation": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16": {"precision": "bf16"},
    "relu": {"model": {"activation": "relu"}},
    "swiglu, no bias": {"model": {"activation": "swiglu", "ffn_hidden_size": 384, "bias": False}},
    "rmsnorm": {"model": {"normalization": "rmsnorm"}},
    "rmsnorm, bf16": {"model": {"normalization": "rmsnorm"}, "precision": "bf16"},
    "grouped queries": {"model": {"num_key_value_heads": 2}},
    "grouped queries, bf16": {"model": {"num_key_value_heads": 2}, "precision": "bf16"},
    "sdpa, bf16": {"attention": {"backend": "sdpa"}, "precision": "bf16"},
    "dropout, bf16": {"model": {"dropout": DROPOUT}, "precision": "bf16"},
    "t5, bf16": {"model": {"position": "t5"}, "precision": "bf16"},
    "rotary": {"model": {"position": "rotary"}},
    "rotary, grouped queries": {"model": {"position": "rotary", "num_key_value_heads": 2}},
    "rotary, grouped queries, bf16": {
        "model": {"position": "rotary", "num_key_value_heads": 2}, "precision": "bf16",
    },
    "sinusoidal": {"model": {"position": "sinusoidal"}},
    "t5": {"model": {"position": "t5"}},
    "reference": {"attention": {"backend": "reference"}},
    "reference, grouped queries": {
        "model": {"num_key_value_heads": 2}, "attention": {"backend": "reference"},
    },
    "reference, bf16": {"attention": {"backend": "reference"}, "precision": "bf16"},
    "dropout": {"model": {"dropout": DROPOUT}},
    "dropout, relu": {"model": {"dropout": DROPOUT, "activation": "relu"}},
    "several chunks of queries": {"data": {"sequence_length": 512}},
    "several chunks, bf16": {"data": {"sequence_length": 512}, "precision": "bf16"},
    "several chunks, no bias": {
        "model": {"position": "sinusoidal"}, "data": {"sequence_length": 512},
    },
    "selective": {"train": {"recompute": "selective"}},
    "full": {"train": {"recompute": "full"}},
}  # fmt: skip


def variant(sections: dict[str, Any], num_layers: int) -> RunConfig:
    model = {**SHAPE, **sections.get("model", {}), "num_layers": num_layers}
    return tiny_config(
        **{**sections, "model": model, "data": {"sequence_length": 64, **sections.get("data", {})}}
    )


def saved_bytes(config: RunConfig, groups: Any) -> int:
    """Of all storages that one forward pass keeps, weights and buffers apart."""
    [stage] = build_stages(config, VOCAB, groups)
    own = {one.untyped_storage().data_ptr() for one in (*stage.parameters(), *stage.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = random_microbatches(config, groups, 0)[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(batch.tokens_BS, batch.labels_BS)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure_layers(pairs: list[tuple[RunConfig, RunConfig]]) -> list[int]:
    """What the deeper of each pair keeps more."""
    groups = process_groups.start(pairs[0][0], Process.from_environment(), LONE)
    return [saved_bytes(deeper, groups) - saved_bytes(one, groups) for one, deeper in pairs]


def test_formula_is_what_the_layers_save() -> None:
    pairs = [(variant(changed, 1), variant(changed, 2)) for changed in VARIANTS.values()]
    [measured] = run_distributed(measure_layers, 1, pairs)
    planned = []
    for config, _ in pairs:
        one = layer_bytes(config, LONE, "cpu")
        full = config.train.recompute == "full"
        planned.append(Sizes.of(config, LONE).stream if full else one)
    # Means and deviations of the norms are left out of the formula, and T5's bool mask.
    for name, got, want in zip(VARIANTS, measured, planned, strict=True):
        assert want == pytest.approx(got, rel=0.01), name


def test_bias_is_kept_once_and_not_on_a_gpu() -> None:
    config = variant({}, 2)
    assert bias_bytes(config, LONE, "cpu") == 4 * 4 * 64 * 64
    assert bias_bytes(config, LONE, "cuda") == 0
    dropped = variant({"model": {"dropout": {"attention": 0.1}}}, 2)
    assert bias_bytes(dropped, LONE, "cuda") == 4 * 4 * 64 * 64  # FlexAttention has no dropout


@pytest.mark.parametrize(("backend", "on_gpu"), [("auto", 0), ("sdpa", 0), ("reference", 1)])
def test_without_a_bias_a_mask_is_kept_where_the_kernel_reads_it(backend: str, on_gpu: int) -> None:
    rotary = {"model": {"position": "rotary"}, "attention": {"backend": backend}}
    mask = 4 * 64 * 64
    assert bias_bytes(variant(rotary, 2), LONE, "cpu") == mask
    assert bias_bytes(variant(rotary, 2), LONE, "cuda") == on_gpu * mask


def test_tensor_parallel_ranks_share_all_but_the_residual_stream() -> None:
    config = variant({}, 1)
    stream = 4 * 2 * 64 * 256
    whole = layer_bytes(config, LONE, "cpu")
    split = layer_bytes(config, Layout(1, 2, 1, 1, False), "cpu")
    assert split == (whole - 4 * stream) / 2 + 4 * stream
    assert layer_bytes(config, Layout(1, 2, 1, 1, True), "cpu") == whole / 2


def test_constants_are_those_of_the_model() -> None:
    assert loss.MAX_LOGITS == activations.MAX_LOGITS
    assert loss.MIN_ROWS == activations.MIN_ROWS
    assert attention_backends.CPU_QUERIES == activations.CPU_QUERIES

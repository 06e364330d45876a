"""What the engine does beside agreeing with itself at every layout."""

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_lm.config import RunConfig
from distributed_lm.errors import TrainingError
from tests.support.ranks import run_distributed
from tests.support.training import build_engine, random_microbatches, tiny_config, train_tiny

BF16_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {}),
    "pp2-interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "tp2-pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "dp2-zero2": (2, {"zero": {"stage": 2}}),
    "tp2-sequence-zero3": (2, {"parallel": {"tensor": 2, "sequence": True}, "zero": {"stage": 3}}),
}


@pytest.mark.parametrize("layout", list(BF16_LAYOUTS))
def test_bf16_stays_close_to_fp32(layout: str) -> None:
    world_size, sections = BF16_LAYOUTS[layout]
    exact = run_distributed(train_tiny, 1, tiny_config(zero={"stage": 0}), 12)[0]
    result = run_distributed(train_tiny, world_size, tiny_config(precision="bf16", **sections), 12)[
        0
    ]
    # bf16 has 8 bits: 4e-3 relative on a value, far less on a loss averaged over 256 tokens.
    np.testing.assert_allclose(result["losses"], exact["losses"], rtol=3e-4)
    np.testing.assert_allclose(result["grad_norms"], exact["grad_norms"], rtol=1e-2)


def overfit(config: RunConfig, steps: int) -> list[float]:
    engine, groups = build_engine(config)
    batch = random_microbatches(config, groups, 0)
    return [engine.train_step(batch, 3e-3).loss for _ in range(steps)]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_small_model_overfits_one_batch(activation: str) -> None:
    model = {"activation": activation, "normalization": "rmsnorm", "tie_embeddings": False}
    [losses] = run_distributed(overfit, 1, tiny_config(model=model), 60)
    assert losses[0] > 5.0
    assert losses[-1] < 0.1


MODELS: dict[str, dict[str, Any]] = {
    "swiglu-rmsnorm-no-bias": {
        "activation": "swiglu", "ffn_hidden_size": 96, "normalization": "rmsnorm", "bias": False,
    },
    "untied-grouped-queries": {"tie_embeddings": False, "num_key_value_heads": 2},
    "12-heads": {"num_attention_heads": 12, "hidden_size": 96, "activation": "gelu_tanh"},
}  # fmt: skip


@pytest.mark.parametrize("model", list(MODELS))
def test_other_architectures_split_without_a_trace(model: str) -> None:
    """Activations, norms, biases, tying, grouped queries."""
    shape = MODELS[model]
    serial = run_distributed(train_tiny, 1, tiny_config(model=shape, zero={"stage": 0}), 8)[0]
    grid = tiny_config(model=shape, parallel={"tensor": 2, "pipeline": 2, "sequence": True})
    parallel = run_distributed(train_tiny, 4, grid, 8)[0]
    np.testing.assert_allclose(parallel["losses"], serial["losses"], rtol=5e-6)
    np.testing.assert_allclose(parallel["grad_norms"], serial["grad_norms"], rtol=1e-4)


def step_with_little_memory(config: RunConfig) -> str:
    engine, groups = build_engine(config)
    batch = random_microbatches(config, groups, 0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(TrainingError) as caught:
        engine.train_step(batch, 1e-3)
    return str(caught.value)


def test_out_of_memory_names_the_part_and_the_remedy() -> None:
    config = tiny_config(batch={"global_batch_size": 512, "micro_batch_size": 512})
    [message] = run_distributed(step_with_little_memory, 1, config)
    assert message.startswith("out of memory in forward and backward; lower batch.micro_batch_size")

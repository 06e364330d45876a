"""Bytes that a run needs for certain: a lower bound, for saying no before anything is queued."""

from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.parameters import total_parameters

MASTER_BYTES = 4
MOMENTS_BYTES = {"adamw": 8, "nag": 4}
"""Per parameter, fp32: master weight, and the optimizer's two moments or one."""


def state_bytes_per_device(config: RunConfig, layout: Layout, vocab_size: int) -> int:
    """Weights, fp32 gradients and optimizer state of one device, if the layers divide evenly.

    Activations come on top. ZeRO 1 shards the optimizer over the data-parallel ranks, 2 also the
    gradients, 3 also the weights (Rajbhandari et al. 2020, ZeRO, figure 1).
    """
    parameters = total_parameters(config.model, vocab_size) / (layout.tensor * layout.pipeline)
    is_fp32 = config.precision == "fp32"
    moments = MOMENTS_BYTES[config.optimizer.kind]
    parts = {
        1: moments if is_fp32 else MASTER_BYTES + moments,
        2: 4,  # gradients, accumulated in fp32
        3: 4 if is_fp32 else 2,  # weights
    }
    stage, data = config.zero.stage, layout.data
    return round(
        parameters * sum(size / (data if stage >= part else 1) for part, size in parts.items())
    )


def check_fits(config: RunConfig, layout: Layout, vocab_size: int, bytes_per_device: float) -> None:
    """Raises ConfigError if the state alone does not fit on a device, naming what would help."""
    needed = state_bytes_per_device(config, layout, vocab_size)
    if needed > bytes_per_device:
        raise ConfigError(
            f"model: weights, gradients and optimizer state need {needed / 1e9:.1f} GB on each "
            f"device with {layout.describe()} and zero.stage={config.zero.stage}, a device has "
            f"{bytes_per_device / 1e9:.0f} GB; raise zero.stage, parallel.tensor or the number of "
            "nodes"
        )


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Of one checkpoint: weights, masters, moments."""
    weights = 4 if config.precision == "fp32" else 2
    parameters = total_parameters(config.model, vocab_size)
    return parameters * (weights + MASTER_BYTES + MOMENTS_BYTES[config.optimizer.kind])

"""Worker functions for tests of export and import: runs with random weights, without training."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_lm import process_groups
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.checkpoint.folders import checkpoint_path, saved_steps
from distributed_lm.checkpoint.plain import PlainCheckpoint
from distributed_lm.checkpoint.store import Save
from distributed_lm.config import RunConfig, load_config
from distributed_lm.data.manifest import read_manifest
from distributed_lm.export.classes import config_json
from distributed_lm.export.incoming import import_hf
from distributed_lm.export.outgoing import export_hf
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.planner.vocabulary import padded_vocab_size
from distributed_lm.process_groups import Process
from tests.support.runs import SMOKE

LENGTH = 32
SMALL = (
    f"data.sequence_length={LENGTH}", "evaluation.lengths=[]", "model.num_layers=3",
    "tracking.wandb=disabled",
)  # fmt: skip


def small_run(name: str, data: Path, output_dir: Path, *overrides: str) -> RunConfig:
    fixed = [f"name={name}", f"data.path={data}", f"output_dir={output_dir}", *SMALL]
    return load_config(SMOKE, [*fixed, *overrides])


def save_random_run(config: RunConfig) -> None:
    """A run folder with a checkpoint of step 1 in which every tensor, also biases and norms, is
    random, and large enough that a wrong one shows in the logits."""
    manifest = read_manifest(config.data.corpora[0].path)
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    stages = build_stages(config, padded_vocab_size(config.model, manifest.vocab_size), groups)
    shards = parameter_shards(stages, groups)
    initialize_weights(shards, config.model, config.seed)
    generator = torch.Generator().manual_seed(5)
    for shard in shards:
        values = shard.parameter.data
        values.add_(torch.randn(values.shape, generator=generator).to(values.dtype), alpha=0.15)
    state: dict[str, Any] = {
        "data": {"corpus_hash": "", "tokenizer": manifest.tokenizer.fingerprint},
        "layout": groups.layout.describe(),
        "config": config.model_dump(mode="json"),
    }
    Save(config.run_dir, 1, model_blocks(shards, groups), state, groups, 60.0).finish()
    (config.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    process_groups.stop()


def there_and_back(config: RunConfig, folder: Path, back: Path) -> str:
    """A random run, exported to ``folder`` and imported as the run ``back``; what was printed."""
    save_random_run(config)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export_hf(config.run_dir, folder, [])
        import_hf(folder, back, [f"data.path={config.data.path}"])
    return printed.getvalue()


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """Every weight of the newest checkpoint, as its bits."""
    checkpoint = PlainCheckpoint(checkpoint_path(run, saved_steps(run)[-1]))
    names = [name for name in checkpoint if name.startswith("model.")]
    return {name: checkpoint.read(name).view(torch.uint8).numpy() for name in names}


def own_class_against_ours(configs: list[RunConfig]) -> list[float]:
    """Of each config, the largest difference between the logits of our stage and those of
    ``modeling_distributed_lm.py`` with the same weights, over twice the trained length."""
    from distributed_lm.export.modeling_distributed_lm import (
        DistributedLMConfig,
        DistributedLMForCausalLM,
    )

    process = Process.from_environment()
    groups = process_groups.start(configs[0], process, Layout(1, 1, 1, 1, False))
    tokens = torch.randint(257, (2, 2 * LENGTH), generator=torch.Generator().manual_seed(1))
    differences = []
    for config in configs:
        [stage] = build_stages(config, 320, groups)
        shards = parameter_shards([stage], groups)
        initialize_weights(shards, config.model.model_copy(update={"init_std": 0.2}), config.seed)
        weights = {
            piece.name: shard.parameter.data[piece.first_row : piece.first_row + piece.rows]
            for shard in shards
            for piece in shard.pieces
        }
        values = config_json("distributed_lm", config.model, 320, 2 * LENGTH)
        theirs = DistributedLMForCausalLM(DistributedLMConfig(**values)).eval()
        theirs.load_state_dict(weights, strict=True)
        with torch.no_grad():
            ours_BSV = stage(tokens).transpose(0, 1)
            differences.append((theirs(tokens).logits - ours_BSV).abs().max().item())
            assert ours_BSV.abs().max() > 1.0
    return differences

"""One rank of a run, built as training builds it, but on tensors without memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distributed_lm import process_groups
from distributed_lm.checkpoint.blocks import Block
from distributed_lm.config import RunConfig
from distributed_lm.data.batches import step_sequences
from distributed_lm.data.corpora import open_corpora
from distributed_lm.data.manifest import MANIFEST
from distributed_lm.data.sequences import StepSequences
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.model.core_attention import core_attentions
from distributed_lm.model.gpt import GPTStage, build_stages
from distributed_lm.preflight import embedding_rows
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.rehearsal import meta_device
from distributed_lm.rehearsal.views import RankView, SavedBlocks, Script, Weight, bounds
from distributed_lm.training.engine import TrainingEngine
from distributed_lm.training.optimizer import OPTIMIZERS
from distributed_lm.training.snapshot import snapshot_blocks
from distributed_lm.training.zero_state import MASTER


def prepare(config: RunConfig, world_size: int) -> Script:
    """Look at the data set, if it is there; nothing on disk is changed.

    Raises:
        UserError: if the config or its data set is at fault.
    """
    layout = Layout.of(config, world_size)
    # Kernels do not run, so that any machine can rehearse the ones it does not have.
    config = config.model_copy(update={"attention": type(config.attention)()})
    last = config.train.steps - 1
    steps = tuple(sorted({min(step, last) for step in (0, 1, 2, last)}))
    if not any((Path(entry.path) / MANIFEST).exists() for entry in config.data.corpora):
        sequences, note = _stand_in(config)
        rows = config.model.vocab_size
        if rows is None:
            raise ConfigError(
                "model.vocab_size: missing, and data.path, which would give it, is not prepared; "
                "set it, or prepare the data first"
            )
        note += " per epoch: data.path is not prepared"
    else:
        corpora = open_corpora(config)
        rows = corpora[0].manifest.vocab_size
        sequences = step_sequences(config, corpora)
        note = "the order of " + ", ".join(str(corpus.folder) for corpus in corpora)
        if not sequences.order.is_built:
            sequences, note = _stand_in(config)
            note += " per epoch: the blend of data.path is not made before training starts"
    moments = OPTIMIZERS[config.optimizer.kind].moments
    vocab_size = embedding_rows(config, rows)
    return Script(config, layout, vocab_size, moments, sequences, steps, note)


def build_view(script: Script, rank: int) -> RankView:
    """Become ``rank``, build its part of the run, and leave again.

    Raises:
        Exception: whatever the code that training runs raises if it finds itself built wrong.
    """
    with _as_rank(script, rank) as groups:
        with groups.device:
            stages = build_stages(script.config, script.vocab_size, groups)
            local = {id(weight): weight.numel() for s in stages for weight in s.parameters()}
            engine = TrainingEngine(script.config, stages, groups)
            blocks = snapshot_blocks(engine)
        slopes, expected_slopes = _slopes(stages)
        view = RankView(
            rank=rank,
            coordinates=groups.coordinates,
            groups=_megatron_groups(groups),
            deepspeed_groups=_deepspeed_groups(engine),
            layers=tuple(_layers(stage) for stage in stages),
            has_embedding=any(stage.pre_process for stage in stages),
            has_output=any(stage.post_process for stage in stages),
            parameters=sum(local.values()),
            weights=_weights(engine),
            slopes=slopes,
            expected_slopes=expected_slopes,
            samples=_samples(script, groups),
            saved=_saved(blocks),
            state_bytes=_state_bytes(engine, blocks),
        )
        meta_device.forget(engine.deepspeed)
        return view


@contextmanager
def _as_rank(script: Script, rank: int) -> Iterator[ProcessGroups]:
    process = Process(rank=rank, world_size=script.layout.world_size, local_rank=0)
    try:
        yield process_groups.start(script.config, process, script.layout, meta_device.META)
    finally:
        process_groups.stop()


def _stand_in(config: RunConfig) -> tuple[StepSequences, str]:
    """The order over a data set that does not exist, small enough for the second rehearsed step to
    end one epoch and begin the next."""
    blocks = config.tokens_per_step // config.data.block_size * 3 // 2
    return StepSequences(config, [1.0], [blocks], Path()), f"a stand-in of {blocks:,} blocks"


def _megatron_groups(groups: ProcessGroups) -> dict[str, tuple[int, ...]]:
    found = {
        "tensor": groups.tensor,
        "data": groups.data,
        "pipeline": groups.pipeline,
        "model": groups.model,
    }
    if groups.embedding is not None:
        found["embedding"] = groups.embedding
    return {name: _members(group) for name, group in found.items()}


def _deepspeed_groups(engine: TrainingEngine) -> dict[str, tuple[int, ...]]:
    """Those that its engine shards the optimizer over and sums the gradient norm over."""
    return {
        "data": _members(engine.deepspeed.seq_data_parallel_group),
        "model": _members(engine.deepspeed.mpu.get_model_parallel_group()),
    }


def _members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _layers(stage: GPTStage) -> tuple[int, ...]:
    return tuple(layer.layer_number - 1 for layer in stage.decoder.layers)


def _slopes(
    stages: list[GPTStage],
) -> tuple[tuple[tuple[float, ...], ...] | None, tuple[float, ...] | None]:
    """(of the live attention modules layer by layer, of all heads by the paper's formula)."""
    live = [module.position.linear_slopes for module in core_attentions(stages)]
    if any(slopes is None for slopes in live):
        return None, None
    position, one = stages[0].position, torch.ones(1, dtype=torch.float64)
    total = position.heads.total
    expected = tuple(-float(position.expected_bias(head, one)) for head in range(total))
    return tuple(slopes for slopes in live if slopes is not None), expected


def _weights(engine: TrainingEngine) -> tuple[Weight, ...]:
    return tuple(
        Weight(
            piece.name,
            piece.global_shape,
            piece.global_offset,
            (piece.rows, *shard.local_shape[1:]),
            shard.is_sharded,
            shard.is_tied_copy,
        )
        for shard in engine.shards
        for piece in shard.pieces
    )


def _samples(script: Script, groups: ProcessGroups) -> np.ndarray:
    """As the training loop asks for them."""
    rank, size = groups.coordinates.data, groups.layout.data
    steps = [script.sequences.of_rank(step, rank, size) for step in script.steps]
    return np.array(steps, dtype=np.int64)


def _saved(blocks: Sequence[Block]) -> SavedBlocks:
    """Those of which this rank is the one that writes them."""
    mine = [block for block in blocks if not any(block.replica)]
    shapes = {block.key: block.global_shape for block in mine}
    rectangles = [bounds(block.offset, block.values.shape) for block in mine]
    number = {key: index for index, key in enumerate(shapes)}
    return SavedBlocks(
        keys=tuple(shapes),
        global_shapes=tuple(shapes.values()),
        tensor=np.array([number[block.key] for block in mine], dtype=np.int32),
        bounds=np.array(rectangles, dtype=np.int64).reshape(-1, 4),
    )


def _state_bytes(engine: TrainingEngine, blocks: Sequence[Block]) -> int:
    # Without ZeRO the weights are their own masters.
    uncounted = ("random.", MASTER) if engine.config.zero.stage == 0 else ("random.",)
    return sum(block.values.nbytes for block in blocks if not block.key.startswith(uncounted))

"""``distributed-lm import-hf``: a ``transformers`` folder as a run with a checkpoint of step 0.

Tensor by tensor into memory that lies on the disk, then saved as any checkpoint is. In memory is at
most one tensor of theirs and its counterpart; on disk, for a while, the model twice.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.store import Save
from distributed_lm.config import RunConfig, check_config, load_config
from distributed_lm.data.corpora import open_corpora
from distributed_lm.data.tokenizer import TOKENIZER_FILE, JsonTokenizer, tokenizer_of
from distributed_lm.errors import CheckpointError, ConfigError, DataError
from distributed_lm.export.foreign_config import Foreign, read_foreign
from distributed_lm.export.names import Rule, Table, table_of
from distributed_lm.export.safetensors_files import SafetensorsFolder
from distributed_lm.export.tokenizers import SAMPLE
from distributed_lm.layout import Layout
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.process_groups import Process, ProcessGroups

# What transformers' classes have saved beside weights: masks, and rotary frequencies.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
               "rotary_emb.inv_freq")  # fmt: skip
UNKNOWN_DATA = "data/prepare-data-with-this-runs-tokenizer"


def import_hf(folder: Path, output: Path, overrides: list[str]) -> None:
    """Read, check, publish.

    Args:
        folder: as ``save_pretrained`` writes it, in safetensors.
        output: run folder to make.
        overrides: config fields of the run; ``data.path`` where a data set is there already.

    Raises:
        UserError: if the model is none of ours, or its tokenizer is not that of ``data.path``.
    """
    process = Process.from_environment()
    if process.world_size > 1:
        raise ConfigError(f"WORLD_SIZE={process.world_size}: start this command as one process")
    draft = output.with_name(output.name + ".draft")
    for path in (output, draft):
        if path.exists():
            raise ConfigError(f"--output {output}: {path} exists; choose another, or remove it")
    platform.give_back_freed_tensors()
    tensors = SafetensorsFolder(folder)
    foreign = read_foreign(folder, tensors)
    config = _config(foreign, output, overrides)
    identity = _data_identity(config, folder)
    table = table_of(foreign.family, foreign.model, foreign.num_positions)
    theirs = _their_names(tensors, table, foreign)
    draft.mkdir(parents=True)
    with process_groups.joined(config, process, Layout.grid(config.parallel, 1)) as groups:
        _save(config, draft, tensors, table, theirs, identity, groups)
    if (folder / TOKENIZER_FILE).is_file():
        shutil.copyfile(folder / TOKENIZER_FILE, draft / TOKENIZER_FILE)
    (draft / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    os.rename(draft, output)
    _say(foreign, config, output)


def _config(foreign: Foreign, output: Path, overrides: list[str]) -> RunConfig:
    """A run of that model; what is about training has to be chosen when training starts."""
    place = output.absolute()
    values: dict[str, Any] = {
        "name": place.name,
        "output_dir": str(place.parent),
        "model": foreign.model.model_dump(mode="json"),
        "data": {"path": UNKNOWN_DATA, "sequence_length": foreign.trained_length},
        "batch": {"global_batch_size": 1},
        "precision": foreign.precision,
        "train": {"steps": 1},
        "optimizer": {"learning_rate": 1e-5},
    }
    with tempfile.TemporaryDirectory() as work:
        base = Path(work) / "imported.yaml"
        base.write_text(RunConfig.model_validate(values).to_yaml(), encoding="utf-8")
        config = load_config(base, overrides)
    if config.model != foreign.model:
        raise ConfigError(
            f"overrides {overrides}: model.* follows from {foreign.folder}/config.json; leave it"
        )
    config = config.with_whole_model()
    check_config(config)
    return config


def _data_identity(config: RunConfig, folder: Path) -> dict[str, str]:
    """Which tokens the model is of: those of the data set if there is one, else of the folder's
    own tokenizer.json.

    Raises:
        DataError: if the two differ, or there is neither.
    """
    if config.data.path == UNKNOWN_DATA:
        if not (folder / TOKENIZER_FILE).is_file():
            raise DataError(
                f"{folder}: has no {TOKENIZER_FILE}, so give a data set that is known to have "
                "its tokenizer: data.path=FOLDER"
            )
        record = JsonTokenizer(folder / TOKENIZER_FILE).record
        return {"corpus_hash": "", "tokenizer": record.fingerprint}
    corpus = open_corpora(config)[0]
    ours = tokenizer_of(corpus.folder, corpus.manifest).encode(SAMPLE).tolist()
    theirs = _their_ids(folder)
    if ours != theirs:
        raise DataError(
            f"data.path: {corpus.folder} was prepared with another tokenizer than {folder} has "
            f"(the ids of a test text differ); prepare it with --tokenizer {folder}/"
            f"{TOKENIZER_FILE}"
        )
    return {"corpus_hash": "", "tokenizer": corpus.manifest.tokenizer.fingerprint}


def _their_ids(folder: Path) -> list[int]:
    """Nothing that lies in the folder is run."""
    if (folder / TOKENIZER_FILE).is_file():
        return list(JsonTokenizer(folder / TOKENIZER_FILE).encode(SAMPLE).tolist())
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise DataError(f"{folder}: transformers finds no tokenizer ({first_line})") from None
    return list(tokenizer(SAMPLE, add_special_tokens=False).input_ids)


def _their_names(tensors: SafetensorsFolder, table: Table, foreign: Foreign) -> dict[str, str]:
    """Where each tensor of the table lies: some folders leave out the model's own prefix.

    Raises:
        CheckpointError: if a tensor is missing, or there is one that the table does not know.
    """
    found = {}
    wanted = [name for rule in table.rules for name in rule.theirs] + list(table.constants)
    for name in wanted:
        stored = name if name in tensors else name.split(".", 1)[1]
        if stored not in tensors:
            raise CheckpointError(f"{foreign.folder}: holds no tensor {name}")
        found[name] = stored
    tied = {foreign.tied_output} if foreign.model.tie_embeddings else set()
    spare = set(tensors) - set(found.values()) - tied
    unknown = sorted(name for name in spare if not name.endswith(NOT_WEIGHTS))
    if unknown:
        raise CheckpointError(
            f"{foreign.folder}: holds {unknown[0]}, which no model of ours has; it is another "
            f"architecture than its model_type={foreign.family} says"
        )
    return found


def _save(
    config: RunConfig,
    draft: Path,
    tensors: SafetensorsFolder,
    table: Table,
    theirs: dict[str, str],
    identity: dict[str, str],
    groups: ProcessGroups,
) -> None:
    blocks = [_block(rule, config, draft, tensors, theirs) for rule in table.rules]
    _check_size(config, tensors, blocks)
    for name, values in table.constants.items():
        if not torch.equal(tensors.read(theirs[name]), values):
            raise CheckpointError(f"{tensors.folder}: {name} is not the table it was taken for")
    state = {
        "data": identity,
        "layout": groups.layout.describe(),
        "updates_done": 0,
        "config": config.model_dump(mode="json"),
        "versions": platform.describe_environment(),
    }
    timeout = config.checkpoint.save_timeout_seconds
    Save(draft, 0, blocks, state, groups, timeout).finish()


def _check_size(config: RunConfig, tensors: SafetensorsFolder, blocks: list[Block]) -> None:
    found = sum(block.values.numel() for block in blocks)
    expected = total_parameters(config.model, _rows(config))
    if found != expected:
        raise CheckpointError(
            f"{tensors.folder}: its tensors have {found:,} parameters together, its config.json "
            f"describes {expected:,}"
        )


def _rows(config: RunConfig) -> int:
    assert config.model.vocab_size is not None, "config.json always says"
    return config.model.vocab_size


def _block(
    rule: Rule,
    config: RunConfig,
    draft: Path,
    tensors: SafetensorsFolder,
    theirs: dict[str, str],
) -> Block:
    parts = tuple(tensors.read(theirs[name]) for name in rule.theirs)
    try:
        ours = rule.transform.to_ours(parts, config.model)
    except RuntimeError as error:
        raise CheckpointError(
            f"{tensors.folder}: {rule.theirs[0]} has shape {tuple(parts[0].shape)}, which does not "
            f"fit its config.json ({error})"
        ) from None
    shape = tuple(ours.shape)
    return Block(f"model.{rule.ours}", _on_disk(draft, ours), shape, (0,) * len(shape), (0, 0, 0))


def _on_disk(folder: Path, values: Tensor) -> Tensor:
    """A copy in a file's memory, which the kernel can take back; the file goes with the tensor."""
    file = folder / ".scratch"
    held = torch.from_file(str(file), shared=True, size=values.numel(), dtype=values.dtype)
    file.unlink()
    return held.view(values.shape).copy_(values)


def _say(foreign: Foreign, config: RunConfig, output: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    parameters = total_parameters(config.model, _rows(config))
    console.print(f"wrote {output}: {foreign.family}, {parameters:,} parameters, step 0")
    if config.data.path == UNKNOWN_DATA:
        console.print(
            f"prepare data with --tokenizer {output}/{TOKENIZER_FILE}, then give it as data.path"
        )

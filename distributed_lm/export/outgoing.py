"""``distributed-lm export-hf``: a run's checkpoint as a folder that ``transformers`` loads.

Written as ``FOLDER.draft``, compared with our own model by a process that does not have this
package, and renamed when the logits agree.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from distributed_lm.checkpoint.folders import checkpoint_path, read_state, saved_steps
from distributed_lm.checkpoint.plain import PlainCheckpoint
from distributed_lm.config import RunConfig, load_run_config, longest_input
from distributed_lm.data.corpora import open_corpora
from distributed_lm.data.manifest import Manifest
from distributed_lm.data.tokenizer import tokenizer_of
from distributed_lm.errors import CheckpointError, ConfigError
from distributed_lm.export.classes import (
    CLASSES,
    MODELING_FILE,
    OWN,
    Choice,
    choose_class,
    config_json,
)
from distributed_lm.export.comparison import Comparison, compare
from distributed_lm.export.names import Table, table_of
from distributed_lm.export.safetensors_files import write_shards
from distributed_lm.export.tokenizers import write_tokenizer
from distributed_lm.planner.vocabulary import padded_vocab_size

WEIGHTS = "model."


@dataclass(frozen=True)
class Source:
    """What is exported."""

    config: RunConfig
    step: int
    data: Path
    manifest: Manifest

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return padded_vocab_size(self.config.model, self.manifest.vocab_size)

    @property
    def num_positions(self) -> int:
        """Longest input of a class that has such a limit: at least twice the trained length."""
        twice = 2 * self.config.data.sequence_length
        return longest_input(self.config) or max(twice, *self.config.evaluation_lengths)

    @property
    def compared_lengths(self) -> tuple[int, ...]:
        """1 × and 2 × the trained length, or as far as the model's positions go."""
        length = self.config.data.sequence_length
        longest = longest_input(self.config) or 2 * length
        return tuple(sorted({length, min(2 * length, longest)}))


def export_hf(source: Path, output: Path, overrides: list[str]) -> None:
    """Write, compare, publish.

    Args:
        source: run folder (its newest checkpoint), or one of its checkpoints.
        overrides: config fields to change, as ``data.path`` if the data set has moved.

    Raises:
        UserError: if there is nothing to export or no class for it; and, with exit code 1, if the
            logits differ.
    """
    found = _find(source, overrides)
    choice = choose_class(found.config.model)
    console = Console(soft_wrap=True, highlight=False)
    _say_class(console, choice)
    draft = output.with_name(output.name + ".draft")
    _check_free(output, draft)
    draft.mkdir(parents=True)
    _write(found, choice, draft)
    comparison = compare(
        found.config,
        found.step,
        found.vocab_size,
        found.compared_lengths,
        tokenizer_of(found.data, found.manifest),
        draft,
    )
    _say_comparison(console, comparison)
    comparison.check(draft)
    os.rename(draft, output)
    console.print(f"wrote {output}")


def _find(source: Path, overrides: list[str]) -> Source:
    """Raises UserError if this is neither a run nor a checkpoint, or its tokenizer is not there."""
    run, step = source, None
    if source.parent.name == "checkpoints" and source.name.startswith("step_"):
        run, step = source.parent.parent, int(source.name.removeprefix("step_"))
    config = load_run_config(run, overrides)
    steps = saved_steps(config.run_dir)
    if not steps:
        raise CheckpointError(f"{run}: no checkpoint in this run folder; train it first")
    step = steps[-1] if step is None else step
    trained_with = read_state(config.run_dir, step)["data"]["tokenizer"]
    corpus = open_corpora(config)[0]
    tokenizer = corpus.manifest.tokenizer.fingerprint
    if trained_with != tokenizer:
        raise ConfigError(
            f"data.path: {corpus.folder} has tokenizer {tokenizer[:12]}, but {run} was trained "
            f"with {trained_with[:12]}; give data prepared with the same --tokenizer"
        )
    return Source(config, step, corpus.folder, corpus.manifest)


def _check_free(output: Path, draft: Path) -> None:
    if output.exists():
        raise ConfigError(f"--output {output}: exists; choose another folder, or remove it")
    if draft.exists():
        raise ConfigError(
            f"{draft}: left by an export that was killed or did not agree; look at it, then "
            "remove it"
        )


def _write(source: Source, choice: Choice, draft: Path) -> None:
    model = source.config.model
    checkpoint = PlainCheckpoint(checkpoint_path(source.config.run_dir, source.step))
    table = table_of(choice.family, model, source.num_positions)
    _check_complete(checkpoint, table, source)
    values = config_json(choice.family, model, source.vocab_size, source.num_positions)
    first = checkpoint.dtype(WEIGHTS + table.rules[0].ours)
    values |= {
        # A table or a scaled embedding has no exact bf16.
        "torch_dtype": "float32" if table.constants else str(first).removeprefix("torch."),
        "bos_token_id": source.manifest.end_of_document,
        "eos_token_id": source.manifest.end_of_document,
        "distributed_lm": {
            "run": source.config.name,
            "step": source.step,
            "trained_length": source.config.data.sequence_length,
            "tokenizer": source.manifest.tokenizer.fingerprint,
        },
    }
    _write_json(draft / "config.json", values)
    write_tokenizer(draft, source.data, source.manifest)
    if choice.family == OWN:
        shutil.copyfile(Path(__file__).with_name(MODELING_FILE), draft / MODELING_FILE)
    write_shards(draft, _tensors(checkpoint, table, source))


def _tensors(
    checkpoint: PlainCheckpoint, table: Table, source: Source
) -> Iterator[tuple[str, Tensor]]:
    for rule in table.rules:
        theirs = rule.transform.to_theirs(checkpoint.read(WEIGHTS + rule.ours), source.config.model)
        yield from zip(rule.theirs, theirs, strict=True)
    yield from table.constants.items()


def _check_complete(checkpoint: PlainCheckpoint, table: Table, source: Source) -> None:
    """The table and the checkpoint name the same weights: nothing is left out silently."""
    stored = {name.removeprefix(WEIGHTS) for name in checkpoint if name.startswith(WEIGHTS)}
    wanted = {rule.ours for rule in table.rules}
    folder = checkpoint_path(source.config.run_dir, source.step)
    for names, verb in ((wanted - stored, "does not hold"), (stored - wanted, "also holds")):
        if names:
            raise CheckpointError(
                f"{folder}: {verb} {min(names)}: it is of another model than the config describes; "
                "use the config in the run folder"
            )


def _say_class(console: Console, choice: Choice) -> None:
    console.print(f"class       {CLASSES[choice.family]}")
    if choice.family == OWN:
        console.print(
            f"            no stock class: {choice.reason}; {MODELING_FILE} goes along, and loading "
            "needs trust_remote_code=True"
        )


def _say_comparison(console: Console, comparison: Comparison) -> None:
    for length, difference in comparison.differences.items():
        console.print(
            f"compared    {length} tokens in fp32 by a fresh transformers "
            f"{comparison.transformers_version}: largest difference {difference:.2g} of logits up "
            f"to {comparison.largest_logit:.3g}"
        )
    if comparison.adds_tokens:
        console.print(
            "note        its tokenizer.json adds tokens around a text, which training did not; "
            "encode with add_special_tokens=False"
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")

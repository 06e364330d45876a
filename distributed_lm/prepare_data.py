"""``distributed-lm prepare-data`` and ``merge-data``: text in, a data set for training out.

The input is cut into shards; each is tokenised into ``OUTPUT.partial/`` and kept when finished;
then all are joined and the folder is renamed to ``OUTPUT``. A kill at any instant leaves either
no data set or a whole one, and the same command goes on from the finished shards.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distributed_lm.data.inputs import (
    Piece,
    Shard,
    find_hub_pieces,
    find_pieces,
    find_wikitext_pieces,
    group_pieces,
)
from distributed_lm.data.manifest import SPLITS, WORK_SUFFIX, Manifest
from distributed_lm.data.merge import publish, refuse_occupied
from distributed_lm.data.plan import (
    PLAN,
    Request,
    claim_work_folder,
    discard,
    inputs_identity,
    is_prepared,
    read_plan,
    work_folder,
)
from distributed_lm.data.progress import TokenizingProgress
from distributed_lm.data.shards import Recipe
from distributed_lm.data.tokenizer import TOKENIZER_FILE, open_tokenizer, parse_spec
from distributed_lm.data.workers import Workshop, make_shards
from distributed_lm.errors import DataError

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT...",
        help="Text (one document per file), JSON lines or Parquet: files, folders or globs; "
        "text and JSON lines also with .gz.",
    ),
]
Output = Annotated[Path, typer.Option(help="Folder of the data set; made at the very end.")]
TokenizerSpec = Annotated[
    str, typer.Option(help="gpt2, bytes, words or bpe:VOCABSIZE (made here), or a tokenizer.json.")
]
TextField = Annotated[str, typer.Option(help="JSON key or Parquet column that holds the text.")]
SplitShares = Annotated[
    str, typer.Option(help="Shares of documents in train,valid,test; they sum to 1.")
]
Seed = Annotated[int, typer.Option(min=0, help="Decides which documents go to which split.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 = one per available core.")]
ShardOf = Annotated[
    str | None,
    typer.Option("--shard", help="I/N: do only the I-th of N equal jobs (I from 0), no merge."),
]
ShardMegabytes = Annotated[
    float, typer.Option(min=0.001, help="Input per shard, the unit of work kept after a kill.")
]
HubName = Annotated[
    str | None, typer.Option(help="Stream this data set of the `datasets` library instead.")
]
HubConfig = Annotated[str | None, typer.Option(help="Configuration of --dataset.")]
HubSplit = Annotated[str, typer.Option(help="Split of --dataset to read.")]
WikiText = Annotated[
    bool,
    typer.Option(
        "--wikitext",
        help="--dataset has WikiText's form: its own train, validation and test splits, and one "
        "row per line; its articles become documents.",
    ),
]
EndOfDocument = Annotated[
    str | None, typer.Option(help="Token of the tokenizer.json that ends a document.")
]
Resume = Annotated[
    bool, typer.Option(help="Keep shards finished by an earlier run of the same command.")
]


def prepare_data(
    output: Output,
    inputs: Inputs = None,
    tokenizer: TokenizerSpec = "gpt2",
    text_field: TextField = "text",
    split: SplitShares = "0.98,0.01,0.01",
    seed: Seed = 1,
    workers: Workers = 0,
    shard: ShardOf = None,
    shard_megabytes: ShardMegabytes = 64.0,
    dataset: HubName = None,
    dataset_config: HubConfig = None,
    dataset_split: HubSplit = "train",
    wikitext: WikiText = False,
    end_of_document: EndOfDocument = None,
    resume: Resume = True,
) -> None:
    """Tokenise text into a data set for training."""
    # The docstring is the help text, so the errors stand here: DataError for anything wrong with
    # the inputs, the options or the output folder.
    console = Console(highlight=False, soft_wrap=True)
    # Of WikiText's own splits nothing is left to share out.
    recipe = Recipe(text_field, seed, (1.0, 0.0, 0.0) if wikitext else parse_split(split))
    chosen = parse_shard(shard) if shard else None
    kind, argument = parse_spec(tokenizer)
    hub = (dataset, dataset_config, None if wikitext else dataset_split)
    pieces = _find(inputs, hub, shard_megabytes)
    settings = {
        "tokenizer": _tokenizer_identity(tokenizer, argument, end_of_document),
        "text_field": text_field,
        "split": list(recipe.split),
        "seed": seed,
        "inputs": inputs_identity(pieces),
    }
    if is_prepared(output, settings):
        console.print(f"{output}: already prepared")
        return
    refuse_occupied(output)
    work = work_folder(output)
    if not resume:
        _start_over(work, chosen)
    shards = group_pieces(pieces, _to_bytes(shard_megabytes))
    plan = claim_work_folder(
        work,
        Request(recipe, shards, shard_megabytes, settings, kind, argument, end_of_document),
    )
    workshop = Workshop(work, recipe, kind, work / TOKENIZER_FILE, end_of_document)
    mine = shards[chosen[0] :: chosen[1]] if chosen else shards
    _tokenize(mine, workshop, workers, console)
    if chosen:
        console.print(
            f"{work}: {len(mine)} of {len(plan.shard_keys)} shards are this job's; when all "
            f"{chosen[1]} jobs are done: distributed-lm merge-data {work} --output {output}"
        )
        return
    _report(*publish([work], output), output, console)
    discard(work)


def merge_data(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="What the jobs were given as --output, with or without .partial.",
        ),
    ],
    output: Output,
) -> None:
    """Join the shards that several prepare-data --shard jobs have made into one data set."""
    # DataError if shards are missing, damaged or of different data sets.
    console = Console(highlight=False, soft_wrap=True)
    works = list(dict.fromkeys(_shard_folder(folder) for folder in folders))
    if is_prepared(output, read_plan(works[0]).settings):
        console.print(f"{output}: already prepared")
        return
    _report(*publish(works, output), output, console)
    console.print(f"the shards are kept; to free their space remove {' '.join(map(str, works))}")


def parse_split(text: str) -> tuple[float, float, float]:
    """``0.98,0.01,0.01`` as three shares.

    Raises:
        DataError: if they are not three numbers from 0 to 1 that sum to 1.
    """
    try:
        train, valid, test = (float(part) for part in text.split(","))
    except ValueError:
        raise DataError(
            f"--split {text}: expected three numbers with commas, as in 0.98,0.01,0.01"
        ) from None
    total = train + valid + test
    if min(train, valid, test) < 0 or not abs(total - 1) < 1e-9:
        raise DataError(
            f"--split {text}: expected shares from 0 to 1 that sum to 1, their sum is {total:g}"
        )
    return train, valid, test


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as (index, count).

    Raises:
        DataError: if it is not 0 <= I < N.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise DataError(f"--shard {text}: expected I/N with I from 0 to N-1, as in 0/4")
    return int(index), int(count)


def _find(
    inputs: Sequence[str] | None,
    hub: tuple[str | None, str | None, str | None],
    shard_megabytes: float,
) -> list[Piece]:
    name, config, split = hub
    if split is None and not name:
        raise DataError("--wikitext: says how a --dataset is read; name one, or leave it out")
    if bool(inputs) == bool(name):
        raise DataError("expected either INPUT files or --dataset NAME; give one of the two")
    if name and split is None:
        return find_wikitext_pieces(name, config)
    if name and split:
        return find_hub_pieces(name, config, split)
    return find_pieces(inputs or (), _to_bytes(shard_megabytes))


def _to_bytes(megabytes: float) -> int:
    return max(1, int(megabytes * 1_000_000))


def _tokenizer_identity(spec: str, argument: object, end_of_document: str | None) -> str:
    """The spec, or for a file its content: a path says nothing about what lies there."""
    if not isinstance(argument, Path):
        return spec
    fingerprint = open_tokenizer("json", argument, end_of_document).record.fingerprint
    return f"json:{fingerprint}"


def _start_over(work: Path, chosen: tuple[int, int] | None) -> None:
    if chosen:
        raise DataError(
            f"--no-resume with --shard {chosen[0]}/{chosen[1]} would remove the other jobs' "
            f"shards too; remove {work} by hand, then start the jobs without --no-resume"
        )
    discard(work)


def _tokenize(shards: Sequence[Shard], workshop: Workshop, workers: int, console: Console) -> None:
    total = sum(shard.size for shard in shards)
    with TokenizingProgress(console, total, len(shards)) as progress:
        make_shards(shards, workshop, workers or available_cores(), progress)


def available_cores() -> int:
    """Cores this process may use: a Slurm job often has only some of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not say


def _shard_folder(folder: Path) -> Path:
    work = folder.with_name(folder.name + WORK_SUFFIX)
    return work if not (folder / PLAN).exists() and (work / PLAN).exists() else folder


def _report(
    manifest: Manifest, examples: dict[str, list[str]], output: Path, console: Console
) -> None:
    for reason, count in manifest.skipped.items():
        places = ", ".join(examples.get(reason, []))
        console.print(f"skipped {count:,} × {reason}: {places}{' …' if count > 3 else ''}")
    for split in SPLITS:
        record = manifest.splits[split]
        console.print(
            f"{split:>6}: {record.documents:,} documents, {record.tokens:,} tokens, "
            f"{record.bytes / 1e6:,.1f} MB of text"
        )
        if record.documents == 0 and manifest.settings["split"][SPLITS.index(split)] > 0:
            console.print(
                f"        no document fell into {split}: with so few documents, give it a larger "
                "share with --split or try another --seed"
            )
    console.print(f"{output}: prepared, vocabulary of {manifest.vocab_size:,}")

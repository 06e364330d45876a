"""Preparing gives the same bytes whatever the workers, shards, jobs and kills on the way."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from distributed_lm.data.manifest import read_manifest, verify_manifest
from distributed_lm.data.progress import TokenizingProgress
from distributed_lm.data.tokenizer import ByteTokenizer
from distributed_lm.errors import DataError
from distributed_lm.prepare_data import merge_data, prepare_data

SPLIT = "0.6,0.2,0.2"
SMALL_SHARDS = 0.02  # megabytes: several shards even of a few speeches


def prepare(output: Path, inputs: list[Path], **options) -> Path:
    options = {"tokenizer": "bytes", "split": SPLIT, "workers": 1, **options}
    prepare_data(output, [str(path) for path in inputs], **options)
    return output


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in (".bin", ".idx")}


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, decoded from bytes."""
    ids = np.fromfile(folder / f"{split}.bin", dtype=np.uint16)
    parts = np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]
    return [ByteTokenizer().decode(part[:-1].tolist()) for part in parts]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, speeches) -> Path:
    return prepare(tmp_path_factory.mktemp("whole") / "set", speeches)


def test_every_document_is_there_once_and_in_order(whole, speeches):
    texts = [path.read_text(encoding="utf-8") for path in speeches]
    by_split = {split: documents(whole, split) for split in ("train", "valid", "test")}
    assert all(by_split.values()), "a split is empty"
    for split, found in by_split.items():
        assert found == [text for text in texts if text in found], split
    assert sum(map(len, by_split.values())) == len(texts)
    manifest = verify_manifest(whole)
    assert sum(s.bytes for s in manifest.splits.values()) == sum(len(t.encode()) for t in texts)
    assert manifest.dtype == "uint16"
    assert not whole.with_name("set.partial").exists()


@pytest.mark.parametrize("options", [{"workers": 2}, {"shard_megabytes": 0.5}])
def test_workers_and_shard_size_do_not_change_the_result(whole, speeches, tmp_path, options):
    options = {"shard_megabytes": SMALL_SHARDS, **options}
    other = prepare(tmp_path / "set", speeches, **options)
    assert content(other) == content(whole)
    assert read_manifest(other).corpus_hash == read_manifest(whole).corpus_hash


def test_jobs_merge_to_the_whole(whole, speeches, tmp_path):
    for job in ("0/2", "1/2"):  # as on two machines that share no disk
        folder = tmp_path / f"job{job[0]}"
        prepare(folder, speeches, shard=job, shard_megabytes=SMALL_SHARDS)
        assert not folder.exists()
    with pytest.raises(DataError, match=r"job1\.partial: \d+ of \d+ shards are missing.*000000"):
        merge_data([tmp_path / "job1.partial"], tmp_path / "set")
    merge_data([tmp_path / "job0", tmp_path / "job1.partial"], tmp_path / "set")
    assert content(tmp_path / "set") == content(whole)
    merge_data([tmp_path / "job0", tmp_path / "job1"], tmp_path / "set")  # already prepared


def test_jobs_of_different_data_sets_do_not_merge(speeches, tmp_path):
    prepare(tmp_path / "a", speeches[:2], shard="0/1")
    prepare(tmp_path / "b", speeches[:2], shard="0/1", seed=2)
    with pytest.raises(DataError, match=r"b\.partial: its shards do not belong .*seed is 1 there"):
        merge_data([tmp_path / "a", tmp_path / "b"], tmp_path / "set")
    with pytest.raises(DataError, match=r"c: holds no shards \(plan\.json is missing\)"):
        merge_data([tmp_path / "c"], tmp_path / "set")


KILLED = """
    import os, signal
    from pathlib import Path
    import distributed_lm.data.{module} as module
    from distributed_lm.prepare_data import prepare_data

    original, calls = module.{owner}.{name}, []

    def die_at(*arguments):
        calls.append(1)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    module.{owner}.{name} = die_at
    prepare_data(Path({output!r}), {inputs!r}, tokenizer="bytes", split={split!r}, workers=1,
                 shard_megabytes={shard_megabytes})
"""


@pytest.mark.parametrize(
    ("module", "owner", "name", "call"),
    [
        ("shards", "SplitWriter", "add", 12),  # amid a shard
        ("shards", "os", "rename", 4),  # a shard is written and not yet named
        ("indexed", "HashedFile", "write", 60),
        ("merge", "os", "rename", 40),  # see below: beyond the shards' own renames
    ],
)
def test_killed_run_leaves_no_data_set_and_resumes_to_the_same_bytes(
    whole, speeches, tmp_path, module, owner, name, call
):
    output = tmp_path / "set"
    if module == "merge":
        counted = tmp_path / "count"
        prepare(counted, speeches, shard="0/1", shard_megabytes=SMALL_SHARDS)
        call = len(list(tmp_path.glob("count.partial/shard-*"))) + 1  # the one that publishes
    program = textwrap.dedent(KILLED).replace(
        "{output!r}", f"__import__('pathlib').Path({str(output)!r})"
    )
    program = program.format(
        module=module,
        owner=owner,
        name=name,
        call=call,
        inputs=[str(path) for path in speeches],
        split=SPLIT,
        shard_megabytes=SMALL_SHARDS,
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not output.exists()
    work = output.with_name("set.partial")
    kept = {f: f.stat().st_mtime_ns for f in work.glob("shard-*/shard.json")}
    assert kept, "nothing was finished before the kill"
    rewritten: dict[Path, int] = {}
    original = TokenizingProgress.finish_shard

    def look(self, size):
        rewritten.update({f: f.stat().st_mtime_ns for f in kept})
        original(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizingProgress, "finish_shard", look)
        prepare(output, speeches, shard_megabytes=SMALL_SHARDS)
    assert rewritten == kept, "a finished shard was made again"
    assert content(output) == content(whole)


def test_damaged_shard_is_made_again(whole, speeches, tmp_path):
    prepare(tmp_path / "set", speeches, shard="0/1", shard_megabytes=SMALL_SHARDS)
    work = tmp_path / "set.partial"
    first, second = [path for path in sorted(work.glob("*/train.bin")) if path.stat().st_size][:2]
    first.write_bytes(b"\xff\xff" + first.read_bytes()[2:])
    (second.parent / "shard.json").write_text("{")
    prepare(tmp_path / "set", speeches, shard_megabytes=SMALL_SHARDS)
    assert content(tmp_path / "set") == content(whole)


def test_dead_worker_is_reported_and_the_rest_is_kept(whole, speeches, tmp_path, monkeypatch):
    original = TokenizingProgress.finish_shard

    def kill_all_workers(self, size):
        original(self, size)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizingProgress, "finish_shard", kill_all_workers)
        with pytest.raises(DataError, match=r"a worker process died.* fewer --workers"):
            prepare(tmp_path / "set", speeches, shard_megabytes=SMALL_SHARDS, workers=2)
    assert multiprocessing.active_children() == []
    assert list(tmp_path.glob("set.partial/shard-*"))
    prepare(tmp_path / "set", speeches, shard_megabytes=SMALL_SHARDS)
    assert content(tmp_path / "set") == content(whole)


def test_worker_s_error_reaches_the_user(speeches, tmp_path):
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz: cannot be read"):
        prepare(tmp_path / "set", [*speeches, bad], shard_megabytes=SMALL_SHARDS, workers=2)
    assert not (tmp_path / "set").exists()


def test_formats_hold_the_same_documents(tmp_path, speeches):
    texts = [path.read_text(encoding="utf-8") for path in speeches[:8]]
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    lines = "".join(
        json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(rows)
    )
    folder = tmp_path / "formats"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
    (folder / "notes.md").write_text("not a corpus")
    sets = [
        prepare(tmp_path / f"set-{file.name}", [file], shard_megabytes=size)
        for size in (64.0, SMALL_SHARDS)
        for file in (folder / "a.jsonl", folder / "a.json.gz", folder / "a.parquet")
        if not (tmp_path / f"set-{file.name}").exists()
    ]
    for other in sets[1:]:
        assert content(other) == content(sets[0])
    cut = prepare(tmp_path / "cut", [folder / "a.jsonl"], shard_megabytes=0.005)
    assert content(cut) == content(sets[0])
    together = prepare(tmp_path / "together", [folder])
    assert read_manifest(together).settings["inputs"]["files"] == 3
    for split, texts_of_split in (("train", documents(sets[0], "train")),):
        assert documents(together, split) == texts_of_split * 3


@pytest.mark.parametrize("line_bytes", [50, 73])  # cuts between lines, cuts inside lines
def test_cut_file_loses_and_repeats_no_line(tmp_path, line_bytes):
    texts = [f"document {number}" for number in range(200)]
    lines = [json.dumps({"text": text}).ljust(line_bytes - 1) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    output = prepare(tmp_path / "set", [tmp_path / "a.jsonl"], split="1,0,0", shard_megabytes=0.001)
    assert documents(output, "train") == texts
    assert read_manifest(output).skipped == {}


def test_hub_data_set_is_streamed(tmp_path, speeches, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "hub"
    folder.mkdir()
    texts = [path.read_text(encoding="utf-8") for path in speeches[:4]]
    for number in (0, 2):
        rows = [json.dumps({"content": text}) for text in texts[number : number + 2]]
        (folder / f"part{number}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    output = tmp_path / "set"
    options = {"tokenizer": "bytes", "split": "1,0,0", "workers": 1, "text_field": "content"}
    prepare_data(output, dataset=str(folder), **options)
    assert documents(output, "train") == texts
    with pytest.raises(DataError, match=r"--dataset .*nowhere: cannot be read"):
        prepare_data(tmp_path / "none", dataset=str(tmp_path / "nowhere"), **options)


def test_unusable_documents_are_counted_and_reported(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"text": "cut off',
        b'{"body": "elsewhere"}',
        b'{"text": 7}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "half a pair \\ud83e"}',
        b"[1, 2]",
        b'{"text": "also good"}',
    ]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    output = prepare(tmp_path / "set", [folder], split="1,0,0")
    assert documents(output, "train") == ["marked", "good", "also good"]
    assert read_manifest(output).skipped == {
        "broken JSON line": 1,
        "empty document": 2,
        "invalid UTF-8": 3,
        "no text field": 2,
        "text field is not a string": 2,
    }
    said = capsys.readouterr().out
    assert f"skipped 1 × broken JSON line: {folder}/lines.jsonl:3" in said
    assert f"{folder}/lines.jsonl:4 (found: body)" in said


def test_invalid_text_in_parquet_is_one_skip_not_a_lost_batch(tmp_path):
    binary = pyarrow.array([b"good", b"\xff\xfe", None, b"also good"])
    column = pyarrow.Array.from_buffers(pyarrow.string(), 4, binary.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    output = prepare(tmp_path / "set", [tmp_path / "a.parquet"], split="1,0,0")
    assert documents(output, "train") == ["good", "also good"]
    assert read_manifest(output).skipped == {"invalid UTF-8": 1, "text field is not a string": 1}


def test_same_command_again_changes_nothing_and_another_is_refused(tmp_path, speeches, capsys):
    output = prepare(tmp_path / "set", speeches[:3])
    before = (output / "manifest.json").stat().st_mtime_ns
    prepare(output, speeches[:3], workers=2, shard_megabytes=1.0)
    assert "set: already prepared" in capsys.readouterr().out
    assert (output / "manifest.json").stat().st_mtime_ns == before
    for options, message in [
        ({"seed": 2}, r"set: holds a data set made with other settings \(seed is 1 there and 2"),
        (
            {"split": "1,0,0"},
            r"\(split is \[0\.6, 0\.2, 0\.2\] there and \[1\.0, 0\.0, 0\.0\] here",
        ),
        ({"tokenizer": "gpt2"}, r"\(tokenizer is bytes there and gpt2 here\)"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare(output, speeches[:3], **options)
    with pytest.raises(DataError, match=r"\(bytes is \d+ there and \d+ here\)"):
        prepare(output, speeches[:2])
    assert (output / "manifest.json").stat().st_mtime_ns == before


def test_resuming_with_other_settings_is_refused_unless_started_over(tmp_path, speeches):
    prepare(tmp_path / "set", speeches[:3], shard="0/1")
    with pytest.raises(DataError, match=r"set\.partial: was begun .*\(seed is 1 there and 2"):
        prepare(tmp_path / "set", speeches[:3], seed=2)
    with pytest.raises(DataError, match=r"--no-resume with --shard 0/2 would remove the other"):
        prepare(tmp_path / "set", speeches[:3], seed=2, resume=False, shard="0/2")
    prepare(tmp_path / "set", speeches[:3], seed=2, resume=False)
    assert read_manifest(tmp_path / "set").settings["seed"] == 2


def test_replaced_input_is_tokenised_again(tmp_path, speeches):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"document {number}")
    prepare(tmp_path / "set", [folder], shard="0/1", split="1,0,0")
    (folder / "1.txt").write_text("another document")
    prepare(tmp_path / "set", [folder], split="1,0,0")
    assert documents(tmp_path / "set", "train") == ["document 0", "another document", "document 2"]


def truncated_gzip(folder: Path) -> None:
    whole = gzip.compress(b'{"text": "one of many"}\n' * 1000)
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])


def bad_parquet(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1 no")


def parquet_without_text(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), folder / "a.parquet")


def lines_without_text(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"body": "a"}\n')


def only_empty(folder: Path) -> None:
    (folder / "a.txt").write_text("")


def nothing_known(folder: Path) -> None:
    (folder / "a.pdf").write_text("")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated_gzip, r"a\.jsonl\.gz: cannot be read \(Compressed file ended .*\); download"),
        (bad_parquet, r"a\.parquet: cannot be read .*; download or copy it again"),
        (parquet_without_text, r"a\.parquet: has no column 'text', found body, n; name one with"),
        (lines_without_text, r"no usable document .*1 × no text field, as in .*a\.jsonl:1 \(found"),
        (only_empty, r"no usable document in the input \(1 × empty document, as in .*a\.txt\)"),
        (nothing_known, r"input .*: no text found; expected files that end in \.txt"),
    ],
)
def test_bad_input_is_named_and_leaves_no_data_set(tmp_path, make, message):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "set", [tmp_path / "in"])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "0.9,0.1"}, r"--split 0\.9,0\.1: expected three numbers with commas"),
        ({"split": "0.9,0.1,0.1"}, r"--split .*: expected shares .* their sum is 1\.1"),
        ({"split": "1.5,-0.5,0"}, r"--split .*: expected shares from 0 to 1"),
        ({"split": "nan,0,1"}, r"--split .*: expected shares"),
        ({"shard": "2/2"}, r"--shard 2/2: expected I/N with I from 0 to N-1"),
        ({"shard": "1"}, r"--shard 1: expected I/N"),
        ({"dataset": "wikitext"}, r"expected either INPUT files or --dataset NAME"),
    ],
)
def test_bad_option_is_named(tmp_path, speeches, options, message):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "set", speeches[:1], **options)


def test_input_and_output_that_cannot_be_used_are_named(tmp_path, speeches):
    with pytest.raises(DataError, match=r"input .*nowhere.*: no text found"):
        prepare(tmp_path / "set", [tmp_path / "nowhere*.txt"])
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(DataError, match=r"input .*a\.pdf: unknown format; expected a name"):
        prepare(tmp_path / "set", [tmp_path / "a.pdf"])
    with pytest.raises(DataError, match=r"--output .*: something is already there"):
        prepare(tmp_path, speeches[:1])
    with pytest.raises(DataError, match=r"a\.pdf/set\.partial: cannot be written \(Not a dir"):
        prepare(tmp_path / "a.pdf" / "set", speeches[:1])


def test_help_does_not_import_torch():
    program = "import sys, distributed_lm.prepare_data as m; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert result.stdout.strip() == b"False"

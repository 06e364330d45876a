"""The order of training: what it depends on, and above all what it does not."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_lm.config import RunConfig
from distributed_lm.data.batches import (
    TrainingData,
    build_index_caches,
    check_shared_cache,
    evaluation_stream,
)
from distributed_lm.data.ledger import advance, genesis
from distributed_lm.errors import ConfigError, DataError, TrainingError
from distributed_lm.prepare_data import prepare_data


def open_data(config: RunConfig) -> TrainingData:
    build_index_caches(config)
    return TrainingData(config)


def head_after(config: RunConfig, steps: int) -> str:
    data = open_data(config)
    head = genesis(data.corpus_hash)
    for step in range(steps):
        head = advance(head, data.blocks(step))
    return head


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("index_cache"))
    return target


def test_labels_are_the_next_tokens_of_the_corpus(prepared, make_config):
    config = make_config(str(prepared), data={"block_length": 64, "sequence_length": 64})
    tokens, labels = open_data(config).batch(0, 0, 1)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.shape == labels.shape == (16, 64)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    text = (prepared / "train.bin").read_bytes()
    inside = [row for row in tokens if 256 not in row]  # a document's end: shuffled neighbours
    assert inside
    for row in inside:
        assert row.numpy().astype(np.uint16).tobytes() in text


def test_two_lengths_see_the_same_tokens_in_each_update(prepared, make_config):
    short = make_config(str(prepared))
    long = make_config(
        str(prepared),
        data={"sequence_length": 64},
        batch={"global_batch_size": 8, "micro_batch_size": 1},
    )
    short_data, long_data = open_data(short), open_data(long)
    for step in range(30):
        assert short_data.blocks(step) == long_data.blocks(step)
        for ours, theirs in zip(
            short_data.batch(step, 0, 1), long_data.batch(step, 0, 1), strict=True
        ):
            assert torch.equal(ours.reshape(-1), theirs.reshape(-1))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_hold_the_step_microbatch_by_microbatch(prepared, make_config, size):
    data = open_data(make_config(str(prepared)))
    whole, _ = data.batch(3, 0, 1)
    parts = [data.batch(3, rank, size)[0] for rank in range(size)]
    microbatches = [part.split(2) for part in parts]
    in_order = [part[m] for m in range(len(microbatches[0])) for part in microbatches]
    assert torch.equal(torch.cat(in_order), whole)


def test_order_does_not_depend_on_the_number_of_steps(prepared, make_config):
    short, long = (
        open_data(make_config(str(prepared), train={"steps": steps})) for steps in (5, 3000)
    )
    for step in range(5):
        assert short.blocks(step) == long.blocks(step)
        assert torch.equal(short.batch(step, 0, 1)[0], long.batch(step, 0, 1)[0])


def test_each_epoch_has_every_block_once_in_another_order(other, make_config):
    data = open_data(make_config(str(other), train={"steps": 400}))
    seen = [block for step in range(400) for block in data.blocks(step)]
    epochs = Counter(epoch for _, epoch, _ in seen)
    size = epochs[0]
    orders = [[block for _, e, block in seen if e == epoch] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(size))
    assert orders[0] != orders[1]
    assert [epoch for _, epoch, _ in seen] == sorted(epoch for _, epoch, _ in seen)


def test_batches_follow_the_epoch_s_own_shuffle(other, make_config):
    """Epoch 1 of seed 5 is epoch 0 of seed 6, token for token."""

    def stream(seed: int) -> tuple[torch.Tensor, int]:
        data = open_data(make_config(str(other), seed=seed, train={"steps": 400}))
        blocks = [block for step in range(400) for block in data.blocks(step)]
        first_epoch = sum(epoch == 0 for _, epoch, _ in blocks)
        assert first_epoch < len(blocks)
        return torch.cat([data.batch(step, 0, 1)[0] for step in range(400)]), first_epoch * 64

    five, size = stream(5)
    six, _ = stream(6)
    second_epoch = five.reshape(-1)[size : 2 * size]
    assert torch.equal(second_epoch, six.reshape(-1)[: len(second_epoch)])


def test_seed_changes_the_order_and_nothing_else_does(prepared, make_config, tmp_path):
    config = make_config(str(prepared))
    head = head_after(config, 10)
    moved = copy_of(prepared, tmp_path / "moved")
    assert head_after(make_config(str(moved)), 10) == head
    assert (
        head_after(
            make_config(
                str(prepared), data={"sequence_length": 8}, batch={"global_batch_size": 64}
            ),
            10,
        )
        == head
    )
    assert (
        head_after(make_config(str(prepared), data={"cache_path": str(tmp_path / "c")}), 10) == head
    )
    assert head_after(make_config(str(prepared), seed=6), 10) != head
    assert head_after(config, 9) != head


def test_blend_keeps_the_weights_in_every_prefix(prepared, other, make_config):
    blend = [{"path": str(prepared), "weight": 3}, {"path": str(other), "weight": 1}]
    data = open_data(make_config(blend, train={"steps": 60}))
    drawn = [corpus for step in range(60) for corpus, _, _ in data.blocks(step)]
    for length in range(1, len(drawn) + 1):
        assert abs(sum(drawn[:length]) - length / 4) <= 1
    longer = open_data(make_config(blend, train={"steps": 90}))
    assert [data.blocks(step) for step in range(60)] == [longer.blocks(step) for step in range(60)]
    mixed = [block for step in range(60) for block in data.blocks(step)]
    for number, path in enumerate((prepared, other)):
        alone = open_data(make_config(str(path), train={"steps": 60}))
        order = [block[1:] for step in range(60) for block in alone.blocks(step)]
        ours = [block[1:] for block in mixed if block[0] == number]
        assert ours == order[: len(ours)], "each corpus keeps the order it has alone"


def test_corpus_hash_says_which_corpora_and_weights(prepared, other, make_config):
    def hash_of(*parts: tuple[Path, float]) -> str:
        blend = [{"path": str(path), "weight": weight} for path, weight in parts]
        return open_data(make_config(blend)).corpus_hash

    base = hash_of((prepared, 3), (other, 1))
    assert hash_of((prepared, 6), (other, 2)) == base
    assert hash_of((prepared, 2), (other, 1)) != base
    assert hash_of((other, 3), (prepared, 1)) != base


def test_order_beyond_the_plan_is_refused(prepared, make_config):
    data = open_data(make_config(str(prepared), train={"steps": 10}))
    data.blocks(19)
    with pytest.raises(TrainingError, match=r"the 10 steps of the run: batch 20 of 20 planned"):
        data.blocks(20)


def test_evaluation_reads_documents_in_file_order(prepared, other, make_config):
    config = make_config(str(prepared), evaluation={"split": "train"})
    stream = evaluation_stream(config)
    assert stream.ndim == 1
    assert stream.tobytes() == (prepared / "train.bin").read_bytes()
    limited = make_config(str(prepared), evaluation={"split": "train", "max_tokens": 100})
    assert evaluation_stream(limited).tolist() == stream[:101].tolist()
    blend = [{"path": str(other)}, {"path": str(prepared)}]
    both = evaluation_stream(make_config(blend, evaluation={"split": "train"}))
    first = np.fromfile(other / "train.bin", dtype=np.uint16)
    assert both.tolist() == first.tolist() + stream.tolist()
    clipped = {"split": "train", "max_tokens": len(first) + 6}
    assert len(evaluation_stream(make_config(blend, evaluation=clipped))) == len(first) + 7


def test_evaluation_of_an_empty_split_is_refused(other, make_config):
    with pytest.raises(DataError, match=r"evaluation\.split=valid: holds no text in .*other; set"):
        evaluation_stream(make_config(str(other)))


def test_index_caches_are_built_once(prepared, make_config, tmp_path):
    config = make_config(str(prepared), data={"cache_path": str(tmp_path)})
    build_index_caches(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    build_index_caches(config)
    TrainingData(config).batch(0, 0, 1)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_cache_that_holds_a_pickle_is_not_run(prepared, make_config, tmp_path):
    config = make_config(str(prepared), data={"cache_path": str(tmp_path / "cache")})
    build_index_caches(config)
    file = next((tmp_path / "cache").glob("*/*-sample_index.npy"))
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (ran,))

    file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match=r"sample_index\.npy: not a readable array of numbers"):
        TrainingData(config).blocks(0)
    np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"sample_index\.npy: not a readable array of numbers"):
        TrainingData(config).blocks(0)
    assert not ran.exists()


def test_truncated_or_absent_cache_is_named(prepared, make_config, tmp_path):
    config = make_config(str(prepared), data={"cache_path": str(tmp_path)})
    with pytest.raises(DataError, match=r"document_index\.npy: not a readable array"):
        TrainingData(config).blocks(0)
    build_index_caches(config)
    file = next(tmp_path.glob("*/*-shuffle_index.npy"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"shuffle_index\.npy: .*; remove .*epoch0 and start"):
        TrainingData(config).blocks(0)


def test_cache_folder_that_cannot_be_made_is_named(prepared, make_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(str(prepared), data={"cache_path": str(tmp_path / "file" / "cache")})
    with pytest.raises(ConfigError, match=r"data\.cache_path: .* written to .*file/cache"):
        build_index_caches(config)


def test_shared_cache_is_told_from_a_private_one(prepared, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("distributed_lm.data.index_cache._VISIBLE_WITHIN_SECONDS", 0.1)
    config = make_config(str(prepared), data={"cache_path": str(tmp_path)})

    def first_rank_beside(folder: Path):
        """Barriers at which a first rank that sees ``folder`` does its part."""
        token = folder / ".seen-by-first-rank"
        steps = iter(
            [lambda: token.unlink(missing_ok=True), lambda: None, token.touch, lambda: None]
        )
        return lambda: next(steps)()

    assert check_shared_cache(config, True, lambda: None) is None
    assert check_shared_cache(config, False, first_rank_beside(tmp_path)) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".seen-by-first-rank").unlink()
    for stale in (False, True):
        if stale:
            (tmp_path / ".seen-by-first-rank").touch()
        sentence = check_shared_cache(config, False, first_rank_beside(elsewhere))
        assert sentence is not None
        assert str(tmp_path) in sentence


def damage_truncate(folder: Path) -> None:
    file = folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])


def damage_remove_index(folder: Path) -> None:
    (folder / "train.idx").unlink()


def damage_version(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))


def damage_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_field(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 0}))


def damage_unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"train\.bin: is \d+ bytes long, the manifest says \d+ bytes; copy"),
        (damage_remove_index, r"train\.idx: is missing, the manifest says"),
        (damage_version, r"manifest\.json: format_version is 99, this program reads 1; prepare"),
        (damage_json, r"manifest\.json: damaged \(not valid JSON\); prepare"),
        (damage_field, r"manifest\.json: damaged \(vocab_size: .*\); prepare"),
        (damage_unfinished, r"copy: has no manifest\.json, so it is not a finished data set"),
    ],
)
def test_damaged_data_set_is_named(prepared, make_config, tmp_path, damage, message):
    folder = copy_of(prepared, tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError, match=message):
        build_index_caches(make_config(str(folder)))


def test_what_does_not_fit_is_named(prepared, other, make_config, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such data set; make it with"):
        build_index_caches(make_config(str(tmp_path / "nowhere")))
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(DataError, match=r"half: this data set is not finished \(half\.partial"):
        build_index_caches(make_config(str(tmp_path / "half")))
    big = {"sequence_length": 2**22, "block_length": 2**22}
    with pytest.raises(DataError, match=r"\d+ tokens, fewer than one block of data\.block_length"):
        build_index_caches(make_config(str(other), data=big))
    with pytest.raises(DataError, match=r"model\.vocab_size=200 is smaller than the 257 tokens"):
        build_index_caches(make_config(str(other), model={"vocab_size": 200}))
    (tmp_path / "a.txt").write_text("some words " * 50)
    bpe = tmp_path / "bpe"
    prepare_data(bpe, [str(tmp_path / "a.txt")], tokenizer="bpe:300", split="1,0,0", workers=1)
    blend = [{"path": str(prepared)}, {"path": str(bpe)}]
    with pytest.raises(DataError, match=r"speeches was tokenised with bytes .*bpe with bpe"):
        build_index_caches(make_config(blend))

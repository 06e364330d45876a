"""The paper's WikiText-103 recipe, scaled, on real words through the ``train`` command."""

from pathlib import Path

import pytest

from distributed_lm.config import load_config
from distributed_lm.prepare_data import prepare_data
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, train_run
from tests.support.wikitext import HUB_CONFIG, write_hub_folder

STEPS = 60
# 64 wide, 3 bands over the speeches' words; the schedule, clipping and dropouts are the recipe's.
SCALED = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4",
    "model.ffn_hidden_size=128", "model.vocab_size=null", "model.adaptive.cutoffs=[256,1024]",
    "data.sequence_length=64", "data.block_length=128", "batch.global_batch_size=16",
    "batch.micro_batch_size=4", f"train.steps={STEPS}", "train.log_every=1",
    "optimizer.learning_rate=0.5", "schedule.warmup_steps=20", "schedule.period_steps=40",
    "evaluation.lengths=[64,128]", "evaluation.max_tokens=2048", "checkpoint.save_every=0",
    "parallel.tensor=2", "parallel.sequence=true", "tracking.wandb=disabled",
)  # fmt: skip


def test_words_train_with_the_papers_recipe(
    tmp_path: Path, speeches_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_hub_folder(tmp_path / "hub", sorted(speeches_folder.glob("*.txt"))[:16])
    data = tmp_path / "data"
    options = {"dataset": str(tmp_path / "hub"), "dataset_config": HUB_CONFIG, "wikitext": True}
    prepare_data(data, tokenizer="words", workers=1, **options)
    overrides = [*SCALED, f"data.path={data}", f"output_dir={tmp_path}"]
    config = load_config("configs/runs/wikitext103_alibi_L512.yaml", overrides)
    run_distributed(train_run, 2, config)
    records = Runs.records(config)
    found = losses(records)
    assert len(found) == STEPS
    # The words' own frequencies, which the biases of a softmax would learn first, are 5.5 nats.
    assert sum(found[-5:]) / 5 < found[0] - 1.5
    rates = [line["learning_rate"] for line in records["train"]]
    assert rates[20] == pytest.approx(0.5)
    assert rates[0] == pytest.approx(0.5e-7)
    assert rates[-1] < 0.01
    short, long = (line["loss"] for line in records["evaluation"])
    assert long < short + 0.2  # ALiBi on twice the length

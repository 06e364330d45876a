"""Export and import with the real ``transformers``: every class, there and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm.checkpoint.folders import read_state
from distributed_lm.config import load_config
from distributed_lm.data.manifest import read_manifest
from distributed_lm.errors import DataError
from distributed_lm.evaluate import evaluate
from distributed_lm.export import incoming, outgoing
from distributed_lm.export.comparison import ComparisonError
from distributed_lm.export.incoming import import_hf
from distributed_lm.export.outgoing import export_hf
from distributed_lm.export.tokenizers import write_tokenizer
from distributed_lm.model.positions import METHODS
from tests.support.huggingface import (
    LENGTH,
    own_class_against_ours,
    save_random_run,
    small_run,
    there_and_back,
    weights_of,
)
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, train_run

MPT = ("model.position=alibi", "model.activation=gelu", "model.bias=false")
LLAMA = ("model.position=rotary", "model.activation=swiglu", "model.normalization=rmsnorm",
         "model.bias=false")  # fmt: skip
OWN = "DistributedLMForCausalLM"
GROUPED = "model.num_key_value_heads=2"
# What the model is, and the class it must go out as.
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    # Not a power of two: a third of the slopes come from a second sequence.
    "mpt": ((*MPT, "model.num_attention_heads=12", "model.hidden_size=96"), "MptForCausalLM"),
    "mpt-untied-bf16": ((*MPT, "model.tie_embeddings=false", "precision=bf16"), "MptForCausalLM"),
    "neox": (("model.position=rotary", "model.activation=gelu"), "GPTNeoXForCausalLM"),
    "llama": (
        (*LLAMA, GROUPED, "model.ffn_hidden_size=96", "model.tie_embeddings=false"),
        "LlamaForCausalLM",
    ),
    "sinusoidal": (
        ("model.position=sinusoidal", "model.activation=gelu_tanh", "precision=bf16"),
        "GPT2LMHeadModel",
    ),
    "learned": (("model.position=learned", "model.max_positions=64"), "GPT2LMHeadModel"),
    "paper": (("model.position=alibi", "model.activation=relu"), OWN),
    "t5": (("model.position=t5", GROUPED), OWN),
}


@pytest.mark.parametrize("name", CASES)
def test_export_agrees_and_import_is_its_inverse(
    name: str, demo_data: Path, tmp_path: Path
) -> None:
    overrides, expected_class = CASES[name]
    config = small_run(name, demo_data, tmp_path, *overrides)
    folder, back = tmp_path / "hf", tmp_path / "back"
    [said] = run_distributed(there_and_back, 1, config, folder, back)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == [expected_class]
    # Compared at 1× and 2× the trained length, by a process without this package.
    assert all(f"compared    {length} tokens" in said for length in (LENGTH, 2 * LENGTH))
    assert ("trust_remote_code=True" in said) == (expected_class == OWN)
    before, after = weights_of(config.run_dir), weights_of(back)
    assert before.keys() == after.keys()
    for tensor, bits in before.items():
        np.testing.assert_array_equal(after[tensor], bits, err_msg=tensor)
    changes = {"vocab_size": 320, "ffn_hidden_size": config.model.ffn_size}
    groups = {"num_key_value_heads": config.model.key_value_heads}
    assert load_config(back).model.model_copy(update=groups) == config.model.model_copy(
        update=changes | groups
    )


SHAPES: list[tuple[str, ...]] = [
    (),
    ("model.bias=false", "model.activation=swiglu", GROUPED),
    ("model.normalization=rmsnorm", "model.tie_embeddings=false", "model.activation=gelu_tanh"),
]


def test_our_own_class_computes_every_position_method(demo_data: Path, tmp_path: Path) -> None:
    configs = [
        small_run("run", demo_data, tmp_path, f"model.position={position}",
                  f"model.max_positions={2 * LENGTH}", *shape)
        for position in METHODS
        for shape in SHAPES
    ]  # fmt: skip
    [differences] = run_distributed(own_class_against_ours, 1, configs)
    assert len(differences) == 3 * len(METHODS)
    assert max(differences) < 2e-5, differences


def export_with_swapped_heads(source: Path, output: Path) -> str:
    """Two heads of one layer change places, as another order of slopes would have it."""
    write = outgoing._tensors

    def swapped(*arguments: Any) -> Any:
        for name, tensor in write(*arguments):
            if name == "transformer.blocks.1.attn.out_proj.weight":
                tensor = tensor.clone()
                tensor[:, :32] = tensor[:, :32].roll(16, dims=1)
            yield name, tensor

    outgoing._tensors = swapped
    with pytest.raises(ComparisonError) as caught:
        export_hf(source, output, [])
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_a_wrong_export_is_told_and_not_published(demo_data: Path, tmp_path: Path) -> None:
    config = small_run("run", demo_data, tmp_path, *MPT)
    run_distributed(save_random_run, 1, config)
    folder = tmp_path / "hf"
    [message] = run_distributed(export_with_swapped_heads, 1, config.run_dir, folder)
    assert "its logits differ from ours by up to" in message
    assert not folder.exists()
    assert (tmp_path / "hf.draft" / "model.safetensors").is_file()


def test_a_run_trained_on_four_ranks_is_exported(demo_data: Path, tmp_path: Path) -> None:
    runs = Runs(demo_data, tmp_path)
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "train.steps=2", "evaluation.lengths=[]")
    runs.train("split", *layout, *MPT, world_size=4)
    checkpoint = tmp_path / "split" / "checkpoints" / "step_00000002"
    run_distributed(export_hf, 1, checkpoint, tmp_path / "hf", [])
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["distributed_lm"]["step"] == 2
    assert written["max_seq_len"] == 128


def save_mpt(folder: Path, data: Path, **shape: int) -> None:
    """As MosaicML's: written by transformers, sharded, 12 heads."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(11)
    shape = {"d_model": 96, "n_heads": 12, "n_layers": 3} | shape
    model = MptForCausalLM(MptConfig(**shape, vocab_size=320, max_seq_len=64, eos_token_id=256))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, max_shard_size="5MB" if shape["d_model"] > 96 else "300KB")
    write_tokenizer(folder, data, read_manifest(data))


def transformers_loss(folder: Path, data: Path, length: int, tokens: int) -> float:
    """Nats per token over the first ``tokens`` of the split valid, in windows of ``length``."""
    from transformers import AutoModelForCausalLM

    manifest = read_manifest(data)
    assert manifest.dtype == "uint16"
    stream = np.fromfile(data / "valid.bin", dtype=np.uint16, count=tokens + 1).astype(np.int64)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = torch.from_numpy(stream[:-1]).view(-1, length)
    labels = torch.from_numpy(stream[1:]).view(-1, length)
    with torch.no_grad():
        logits = model(inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def prepare_mpt(folder: Path, data: Path, run: Path, tokens: int) -> list[float]:
    save_mpt(folder, data)
    import_hf(folder, run, [f"data.path={data}"])
    return [transformers_loss(folder, data, length, tokens) for length in (32, 64)]


def train_imported(run: Path, *overrides: str) -> None:
    train_run(load_config(run, ["tracking.wandb=disabled", *overrides]))


def test_a_sharded_mpt_is_evaluated_and_trained_at_any_layout(
    demo_data: Path, tmp_path: Path
) -> None:
    folder, run, tokens = tmp_path / "mpt", tmp_path / "imported", 4096
    [expected] = run_distributed(prepare_mpt, 1, folder, demo_data, run, tokens)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert read_state(run, 0)["step"] == 0
    split = [f"evaluation.max_tokens={tokens}", "parallel.tensor=2", "parallel.pipeline=2"]
    run_distributed(evaluate, 4, run, (32, 64), None, split)
    results = [json.loads(path.read_text()) for path in (run / "evaluation").glob("*.json")]
    found = [result["loss"] for result in sorted(results, key=lambda result: result["length"])]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    chosen = ("train.steps=2", "parallel.tensor=2", "batch.global_batch_size=8",
              "data.sequence_length=64", "precision=bf16", "optimizer.learning_rate=1e-6",
              "evaluation.max_tokens=4096")  # fmt: skip
    run_distributed(train_imported, 2, run, *chosen)
    records = Runs.records(load_config(run))
    # Weights drawn anew would start at ln 320 = 5.77.
    assert records["evaluation"][-1]["loss"] == pytest.approx(expected[1], abs=0.02)
    assert abs(expected[1] - np.log(320)) > 0.2


def growth_while_importing(folder: Path, data: Path, run: Path) -> tuple[int, int]:
    """(bytes of the model, bytes of memory of this process's own that its tensors have left)."""
    save_mpt(folder, data, d_model=512, n_heads=8, n_layers=6)
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    read, taken = incoming._block, []

    def measured(*arguments: Any) -> Any:
        block = read(*arguments)
        status = Path("/proc/self/status").read_text()
        taken.append(int(status.split("RssAnon:")[1].split()[0]) * 1024)
        return block

    incoming._block = measured
    import_hf(folder, run, [f"data.path={data}"])
    return whole, max(taken) - taken[0]


def test_importing_takes_memory_for_a_tensor_not_for_the_model(
    demo_data: Path, tmp_path: Path
) -> None:
    arguments = (tmp_path / "mpt", demo_data, tmp_path / "run")
    [(whole, growth)] = run_distributed(growth_while_importing, 1, *arguments)
    assert whole > 70e6
    assert growth < 20e6


def test_a_data_set_of_another_tokenizer_is_refused(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    run_distributed(save_mpt, 1, folder, demo_data)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        import_hf(folder, tmp_path / "run", [f"data.path={demo_data}"])

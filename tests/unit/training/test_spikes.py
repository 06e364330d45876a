"""What counts as a loss spike."""

import math

import pytest

from distributed_lm.config import SpikeConfig
from distributed_lm.training.spikes import SpikeDetector


def detector(action: str = "log", window: int = 5, threshold: float = 1.0) -> SpikeDetector:
    return SpikeDetector(
        SpikeConfig.model_validate({"action": action, "window": window, "threshold": threshold})
    )


def feed(spikes: SpikeDetector, *losses: float) -> list[bool]:
    return [spikes.is_spike(loss) for loss in losses]


def test_nothing_is_judged_before_the_window_is_full() -> None:
    spikes = detector()
    assert spikes.limit == math.inf
    assert feed(spikes, 9.0, 1.0, 50.0, 1.0) == [False] * 4
    assert spikes.limit == math.inf
    assert feed(spikes, 1.0) == [False]
    assert spikes.limit == 2.0


def test_the_yardstick_is_the_median_not_the_mean() -> None:
    spikes = detector()
    feed(spikes, 2.0, 2.0, 2.0, 2.0, 1000.0)
    assert spikes.limit == 3.0


def test_a_loss_above_median_plus_threshold_is_a_spike_at_it_is_not() -> None:
    spikes = detector(threshold=0.5)
    feed(spikes, *[2.0] * 5)
    assert feed(spikes, 2.5, 2.5000001, 3.0) == [False, True, True]


def test_a_spike_does_not_move_the_yardstick() -> None:
    spikes = detector()
    feed(spikes, *[2.0] * 5)
    assert feed(spikes, *[8.0] * 20) == [True] * 20
    assert spikes.limit == 3.0
    assert list(spikes.losses) == [2.0] * 5


def test_the_yardstick_follows_the_last_window() -> None:
    spikes = detector()
    feed(spikes, *[5.0] * 5)
    assert feed(spikes, 4.5, 4.4, 4.3) == [False] * 3
    assert spikes.limit == pytest.approx(5.5)
    assert feed(spikes, *[4.0] * 5) == [False] * 5
    assert spikes.limit == pytest.approx(5.0)


def test_ignore_judges_nothing() -> None:
    spikes = detector("ignore")
    assert feed(spikes, *[2.0] * 5, 1e9) == [False] * 6
    assert spikes.limit == math.inf


def test_a_resumed_detector_judges_as_the_old_one_would() -> None:
    old = detector()
    feed(old, 9.0, 2.0, 2.1, 2.2, 2.3, 2.4)
    resumed = SpikeDetector(old.config, list(old.losses))
    assert resumed.limit == old.limit == pytest.approx(3.2)
    assert feed(resumed, 2.0, 7.0, 2.0) == feed(old, 2.0, 7.0, 2.0) == [False, True, False]


def test_an_infinite_loss_is_a_spike() -> None:
    spikes = detector()
    feed(spikes, *[2.0] * 5)
    assert feed(spikes, math.inf) == [True]

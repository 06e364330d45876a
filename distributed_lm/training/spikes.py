"""Loss spikes: a loss far above the running median of the steps before it."""

import math
import statistics
from collections import deque

from distributed_lm.config import SpikeConfig


class SpikeDetector:
    """Judges each step's loss by the median of the last ``window`` accepted ones."""

    def __init__(self, config: SpikeConfig, losses: list[float] | None = None) -> None:
        self.config = config
        self.losses: deque[float] = deque(losses or [], maxlen=config.window)

    @property
    def limit(self) -> float:
        """Nats per token above which a loss is a spike; infinite while there is no yardstick."""
        if self.config.action == "ignore" or len(self.losses) < self.config.window:
            return math.inf
        return statistics.median(self.losses) + self.config.threshold

    def is_spike(self, loss: float) -> bool:
        """Judge a loss, and remember it unless it is a spike."""
        if loss > self.limit:
            return True
        self.losses.append(loss)
        return False

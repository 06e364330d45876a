"""Nesterov's accelerated gradient as fairseq has it (``fairseq/optim/nag.py``).

fairseq keeps b, the last velocity, and with learning rates l (now) and l' (last step) does

    p ← p + μ² (l/l') b − (1 + μ) l g        b ← μ (l/l') b − l g

With m = −b/l this is m ← μ m + g and p ← p − l (g + μ m), torch's ``SGD(nesterov=True)``, whose
state does not depend on the learning rate, so that a checkpoint need not hold the last one. Only
weight decay differs: fairseq's multiplies the weights by 1 − l · decay, torch's is in the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch


class NAG(torch.optim.SGD):
    """The above, with a switch that makes ``step`` do nothing, as in ``AdamW``."""

    moments = ("momentum_buffer",)
    skip_update: bool = False

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        """Args:
        params: groups, of which each has a ``decay`` (decoupled weight decay).
        """
        super().__init__(params, lr=lr, momentum=momentum, nesterov=True, foreach=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if self.skip_update:
            return None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["decay"])
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("step", torch.zeros((), device=parameter.device)).add_(1.0)
        return loss

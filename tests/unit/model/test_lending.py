"""A lent weight gets the gradient that it would get if the layers used it themselves."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed_lm.config import ModelConfig
from distributed_lm.model.attention_backends import BACKENDS
from distributed_lm.model.positions import HeadSlice, PositionMethod, build_position
from distributed_lm.model.positions.lending import LentPosition
from tests.support.training import tiny_config

CPU = torch.device("cpu")
LAYERS, MICROBATCHES = 3, 2


def drawn(name: str) -> PositionMethod:
    position = build_position(tiny_config(model={"position": name}).model, HeadSlice(0, 4, 4))
    for weight in position.parameters():
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    return position


def run_layers(hidden: Tensor, position: PositionMethod, recompute: bool) -> Tensor:
    def layer(inputs: Tensor) -> Tensor:
        return inputs + BACKENDS["sdpa"](inputs, inputs, inputs.flip(2), position)

    for _ in range(LAYERS):
        hidden = checkpoint(layer, hidden, use_reentrant=True) if recompute else layer(hidden)
    return hidden


def microbatches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, 4, 24, 16, generator=generator).requires_grad_() for _ in range(MICROBATCHES)
    ]


def close(one: Tensor, other: Tensor) -> None:
    """Equal but for rounding: without gradients sdpa takes smaller chunks of queries."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_direct_use(recompute: bool) -> None:
    """Backward in another order than forward, as virtual stages do it."""
    direct, lent = drawn("t5"), LentPosition(drawn("t5"), CPU)
    arrivals: list[Tensor] = []
    lent.owner.table.register_hook(arrivals.append)
    expected_inputs, inputs = microbatches(), microbatches()
    expected = [run_layers(hidden, direct, recompute=False) for hidden in expected_inputs]
    live = [run_layers(lent.lend(hidden), lent.copy, recompute) for hidden in inputs]
    for one, other in zip(expected, live, strict=True):
        close(one, other)
        one.square().sum().backward()
        other.square().sum().backward()
    close(lent.owner.table.grad, direct.table.grad)
    assert len(arrivals) == MICROBATCHES  # one part for each, whatever the number of layers
    for one, other in zip(expected_inputs, inputs, strict=True):
        close(one.grad, other.grad)


class Leaf(PositionMethod):
    """Autograd saves its weight itself, not a function of it."""

    has_bias = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        self.rates = nn.Parameter(torch.full((heads.count, 1), 0.3))

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        distance = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(num_keys)
        return -(self.rates[:, None] * self.rates[:, None]) * distance.clamp(min=0).float()


def test_another_microbatch_may_begin_before_backward() -> None:
    """As under a pipeline: the copy is refreshed while autograd still needs what it has saved."""
    config = tiny_config(model={"position": "alibi"}).model
    direct, lent = (
        Leaf(config, HeadSlice(0, 4, 4)),
        LentPosition(Leaf(config, HeadSlice(0, 4, 4)), CPU),
    )
    expected = [run_layers(hidden, direct, recompute=False) for hidden in microbatches()]
    live = [run_layers(lent.lend(hidden), lent.copy, False) for hidden in microbatches()]
    for one, other in zip(expected, live, strict=True):
        one.square().sum().backward()
        other.square().sum().backward()
    assert direct.rates.grad is not None
    torch.testing.assert_close(lent.owner.rates.grad, direct.rates.grad)


def test_layers_see_the_weights_of_now_in_fp32() -> None:
    lent = LentPosition(drawn("t5"), CPU)
    lent.owner.to(torch.bfloat16)
    with torch.no_grad():
        lent.owner.table.fill_(0.1)
    [hidden, _] = microbatches()
    output = run_layers(lent.lend(hidden), lent.copy, recompute=False)
    assert lent.copy.table.dtype == torch.float32
    assert torch.equal(lent.copy.table, lent.owner.table.float())
    output.sum().backward()
    assert lent.owner.table.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["alibi", "rotary", "learned", "none"])
def test_methods_that_learn_nothing_on_the_attention_are_not_copied(name: str) -> None:
    position = drawn(name)
    lent = LentPosition(position, CPU)
    [hidden, _] = microbatches()
    assert lent.copy is position
    assert lent.lend(hidden) is hidden

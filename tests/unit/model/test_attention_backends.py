"""Every kernel against the fp32 reference, forward and backward, and the reference against fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distributed_lm.errors import ConfigError
from distributed_lm.model import attention_backends, backend_choice, matmul_attention
from distributed_lm.model.attention_backends import BACKENDS
from distributed_lm.model.backend_choice import choose_backend, unavailable_reason
from distributed_lm.model.core_attention import CoreAttention
from distributed_lm.model.positions import METHODS, HeadSlice, PositionMethod, build_position
from tests.support.training import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEAD_DIM = 16
FIRST_LENGTH = 20
# fp32: rounding of sums of 300 terms. bf16: a few units in the last place of values around 1.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def position_method(name: str, num_heads: int) -> PositionMethod:
    model = tiny_config(model={"position": name}).model
    position = build_position(model, HeadSlice(0, num_heads, num_heads))
    generator = torch.Generator().manual_seed(num_heads)
    for weight in position.parameters():  # as built, it is zero
        weight.data = torch.randn(weight.shape, generator=generator)
    return position


def draw(
    heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, N, Q, H], key and value [B, G, K, H], laid out as Megatron hands them over."""
    generator = torch.Generator().manual_seed(heads + 100 * queries + keys)
    shapes = [(queries, heads), (keys, groups), (keys, groups)]
    tensors = [
        torch.randn(length, 2, count, HEAD_DIM, generator=generator).to(dtype).permute(1, 2, 0, 3)
        for length, count in shapes
    ]
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)  # type: ignore[return-value]


def forward_backward(
    backend: str, inputs: tuple[Tensor, Tensor, Tensor], position: PositionMethod
) -> list[Tensor]:
    """Output and the gradients of query, key, value and the method's weights, in fp32."""
    weights = list(position.parameters()) if position.has_bias else []
    position.zero_grad()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = BACKENDS[backend](*leaves, position)
    assert output.dtype == inputs[0].dtype
    assert output.shape == inputs[0].shape
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    gradients = [leaf.grad.float() for leaf in (*leaves, *weights)]
    return [output.detach().float(), *gradients]


def formula(query: Tensor, key: Tensor, value: Tensor, position: PositionMethod) -> Tensor:
    """Attention in fp64 with the bias from the method's independent formula, one head at a time."""
    num_queries, num_keys = query.size(2), key.size(2)
    outputs = []
    for head in range(query.size(1)):
        group = head * key.size(1) // query.size(1)
        scores = query[:, head].double() @ key[:, group].double().transpose(1, 2)
        rows = torch.arange(num_keys - num_queries, num_keys)[:, None]
        distance = (rows - torch.arange(num_keys)[None, :]).double()
        bias = position.expected_bias(position.heads.first + head, distance.clamp(min=0))
        scores = scores / math.sqrt(HEAD_DIM) + bias
        weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
        outputs.append(weights @ value[:, group].double())
    return torch.stack(outputs, dim=1)


SHAPES = {
    "square": (4, 4, 64, 64),
    "twelve heads": (12, 12, 33, 33),
    "grouped queries": (12, 4, 48, 48),
    "one key-value head": (4, 1, 31, 31),
    "continuation": (4, 4, 7, 50),
    "continuation of one, grouped": (12, 4, 1, 301),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_reference_is_the_formula(name: str, shape: tuple[int, int, int, int]) -> None:
    position = position_method(name, shape[0])
    inputs = draw(*shape)
    expected = formula(*inputs, position).float()
    torch.testing.assert_close(
        BACKENDS["reference"](*inputs, position), expected, atol=1e-5, rtol=1e-5
    )


# A CPU's kernels with the position methods that they can train.
ON_CPU = [
    (backend, name)
    for backend in ("sdpa", "matmul")
    for name in sorted(METHODS)
    if unavailable_reason(backend, position_method(name, 4), CPU, torch.float32) is None
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("backend", "name"), ON_CPU)
def test_kernel_equals_reference_forward_and_backward(
    backend: str, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    position = position_method(name, shape[0])
    inputs = draw(*shape, dtype)
    expected = forward_backward("reference", inputs, position)
    for live, wanted in zip(forward_backward(backend, inputs, position), expected, strict=True):
        atol = TOLERANCES[dtype] * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(live, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("chunk_rows", [1, 7, 49])
@pytest.mark.parametrize(
    "shape", [(4, 4, 50, 50), (12, 4, 50, 50), (4, 2, 9, 50)], ids=["square", "grouped", "tail"]
)
@pytest.mark.parametrize(("backend", "name"), ON_CPU)
def test_query_chunks_change_nothing(
    backend: str,
    name: str,
    shape: tuple[int, int, int, int],
    chunk_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    position = position_method(name, shape[0])
    inputs = draw(*shape)
    expected = forward_backward(backend, inputs, position)
    bias_heads = shape[0] if position.has_bias else 1
    monkeypatch.setattr(attention_backends, "MAX_BIAS_ELEMENTS", chunk_rows * bias_heads * shape[3])
    position = position_method(name, shape[0])
    biases: list[torch.Size] = []
    watch_biases(monkeypatch, biases)
    for live, wanted in zip(forward_backward(backend, inputs, position), expected, strict=True):
        torch.testing.assert_close(live, wanted, atol=1e-5, rtol=1e-5)
    for size in biases:
        assert size.numel() <= attention_backends.MAX_BIAS_ELEMENTS
    if position.has_bias:
        assert len(biases) == -(-shape[2] // chunk_rows)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 603, 603), (2, 2, 300, 700)], ids=["square", "tail"])
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_several_chunks_of_queries(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    position = position_method("alibi", shape[0])
    inputs = draw(*shape, dtype)
    live = forward_backward(backend, inputs, position)
    for one, wanted in zip(live, forward_backward("reference", inputs, position), strict=True):
        atol = TOLERANCES[dtype] * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(one, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize(("backend", "chunk"), [("sdpa", 192), ("matmul", 128)])
def test_a_cpu_kernel_is_not_given_keys_that_its_queries_do_not_see(
    backend: str, chunk: int
) -> None:
    position = position_method("alibi", 4)
    query, key, value = (tensor.detach() for tensor in draw(4, 4, 500, 550))
    for first in range(chunk, 500, chunk):
        seen = [tensor.clone() for tensor in (key, value)]
        for tensor in seen:
            tensor[:, :, 50 + first :] = math.nan  # which a mask does not hide
        context = BACKENDS[backend](query, *seen, position)
        assert context[:, :, :first].isfinite().all()


def test_matmul_does_not_round_scores_to_16_bits() -> None:
    """A score of 40 would be off by up to an eighth, and its weight by as much of itself."""
    position = position_method("none", 4)
    query, key, value = (tensor.detach() for tensor in draw(4, 4, 64, 64, torch.bfloat16))
    inputs = (8 * query, 4 * key, value)
    errors = {}
    expected = formula(*inputs, position)
    for backend in ("sdpa", "matmul"):
        errors[backend] = (BACKENDS[backend](*inputs, position) - expected).norm()
    assert errors["matmul"] < 1.5 * errors["sdpa"]


def test_matmul_is_an_operator_that_torch_compile_can_take() -> None:
    """Its strides are those of the fake one, for slices of one tensor as Megatron's are."""
    query, *others = draw(4, 4, 130, 140, torch.bfloat16)
    query, key, value = (one.permute(2, 0, 1, 3).repeat(1, 1, 1, 3) for one in (query, *others))
    slices = [one[..., :HEAD_DIM].permute(1, 2, 0, 3) for one in (query, key, value)]
    inputs = [one.detach().requires_grad_() for one in slices]
    bias = torch.zeros(1, 130, 140)
    torch.library.opcheck(matmul_attention.matmul_attention, (*inputs, bias))


@pytest.mark.parametrize("reentrant", [True, False])
def test_matmul_under_recomputation(reentrant: bool) -> None:
    position = position_method("alibi", 4)
    expected = draw(4, 2, 200, 200, torch.bfloat16)
    BACKENDS["matmul"](*expected, position).square().sum().backward()
    live = draw(4, 2, 200, 200, torch.bfloat16)
    checkpoint(
        BACKENDS["matmul"], *live, position, use_reentrant=reentrant
    ).square().sum().backward()
    for one, wanted in zip(live, expected, strict=True):
        assert torch.equal(one.grad, wanted.grad)


def test_matmul_has_no_more_scores_at_once_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bias too, where the mask is the same for all heads."""
    monkeypatch.setattr(matmul_attention, "MAX_SCORES", 4 * 700 * 9)
    position, inputs = position_method("rotary", 4), draw(4, 2, 30, 700)
    product, sizes = torch.baddbmm, []

    def noted(*arguments: Any, **options: Any) -> Tensor:
        sizes.append((scores := product(*arguments, **options)).numel())
        return scores

    monkeypatch.setattr(torch, "baddbmm", noted)
    live = forward_backward("matmul", inputs, position)
    for one, wanted in zip(live, forward_backward("reference", inputs, position), strict=True):
        torch.testing.assert_close(one, wanted, atol=2e-5, rtol=0)
    assert max(sizes) <= 4 * 700 * 9
    assert len(sizes) == 2 * 2 * 4  # forward and backward, two sequences, 30 queries by nine


def watch_biases(monkeypatch: pytest.MonkeyPatch, sizes: list[torch.Size]) -> None:
    """Note the size of every bias that is made."""
    original = attention_backends.causal_bias

    def noted(*arguments: Any) -> Tensor:
        bias = original(*arguments)
        sizes.append(bias.shape)
        return bias

    monkeypatch.setattr(attention_backends, "causal_bias", noted)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "matmul"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_module_takes_any_length_after_any_other(name: str, backend: str) -> None:
    """1×, 4×, 5×, 16× of the first call, back again, ragged lengths, and continuations."""
    attention = CoreAttention(None, 1, position_method(name, 4), backend)  # type: ignore[arg-type]
    lengths = [(factor * FIRST_LENGTH,) * 2 for factor in (1, 4, 5, 16, 1)]
    for queries, keys in [*lengths, (1, 1), (37, 37), (5, 37), (1, 38), (20, 20)]:
        query, key, value = (tensor.detach() for tensor in draw(4, 2, queries, keys))
        live = attention(*(tensor.permute(2, 0, 1, 3) for tensor in (query, key, value)))
        assert live.shape == (queries, 2, 4 * HEAD_DIM)
        turn, places = attention.position.expected_rotation, torch.arange(keys)
        query, key = turn(query.double(), places[keys - queries :]), turn(key.double(), places)
        expected = formula(query, key, value, attention.position).permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(live.detach().double(), expected, atol=1e-5, rtol=1e-5)


def test_an_attention_mask_is_refused() -> None:
    attention = CoreAttention(None, 1, position_method("alibi", 4), "sdpa")  # type: ignore[arg-type]
    query, key, value = (tensor.permute(2, 0, 1, 3) for tensor in draw(4, 4, 8, 8))
    with pytest.raises(ValueError, match="takes no attention_mask"):
        attention(query, key, value, torch.ones(8, 8))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_equals_reference_forward(name: str, shape: tuple[int, int, int, int]) -> None:
    """Uncompiled on the CPU: the same mask and score functions as the kernel gets on a GPU."""
    position = position_method(name, shape[0])
    inputs = [tensor.detach() for tensor in draw(*shape)]  # it has no backward on a CPU
    with torch.no_grad():
        live = BACKENDS["flex"](*inputs, position)
        expected = BACKENDS["reference"](*inputs, position)
    torch.testing.assert_close(live, expected, atol=2e-5, rtol=0)


TENSOR_PARALLEL = [
    HeadSlice.of(total, rank, size)
    for total, size in [(1, 1), (2, 1), (2, 2), (8, 4), (12, 3), (16, 2), (20, 4), (64, 8)]
    for rank in {0, size - 1}
]


def _name(heads: HeadSlice) -> str:
    return f"{heads.first}-{heads.first + heads.count - 1}of{heads.total}"


@pytest.mark.parametrize("heads", TENSOR_PARALLEL, ids=_name)
def test_alibi_score_mod_is_the_bias_of_this_ranks_heads(heads: HeadSlice) -> None:
    """Computed in the kernel or looked up, at distances far past those that bf16 can tell apart."""
    position = build_position(tiny_config().model, heads)
    first_query, num_keys = 16000, 16384
    add_bias = position.score_mod(first_query, num_keys, CPU)
    assert add_bias is not None
    head, query = torch.arange(heads.count)[:, None, None], torch.arange(3)[:, None]
    key = torch.arange(num_keys)
    live = add_bias(torch.tensor(0.5), torch.tensor(0), head, query, key)
    assert live.dtype == torch.float32
    expected = position.bias(range(first_query, first_query + 3), num_keys, CPU) + 0.5
    torch.testing.assert_close(live, expected, atol=0, rtol=1e-6)
    is_power_of_two = heads.total in (1, 2, 8, 16, 64)
    captured = [cell.cell_contents for cell in add_bias.__closure__ or ()]
    assert any(isinstance(value, Tensor) for value in captured) != is_power_of_two


@pytest.mark.parametrize("heads", TENSOR_PARALLEL, ids=_name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_equals_reference_on_every_slice_of_heads(heads: HeadSlice) -> None:
    position = build_position(tiny_config().model, heads)
    inputs = [tensor.detach() for tensor in draw(heads.count, heads.count, 130, 150)]
    live, expected = (BACKENDS[name](*inputs, position) for name in ("flex", "reference"))
    torch.testing.assert_close(live, expected, atol=2e-5, rtol=0)


class LearnedBias(PositionMethod):
    """A user's own method whose bias is trained, and has no ``score_mod``."""

    has_bias = True

    def __init__(self) -> None:
        super().__init__(tiny_config().model, HeadSlice(0, 4, 4))
        self.table = torch.nn.Parameter(torch.zeros(4, 64))

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        rows = torch.arange(queries.start, queries.stop)[:, None]
        return self.table[:, (rows - torch.arange(num_keys)).clamp(min=0)]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_trained_bias_is_never_stale(backend: str) -> None:
    """Not after evaluation without gradients at the same length, and not after an update."""
    position = LearnedBias()
    inputs = draw(4, 4, 16, 16)
    with torch.no_grad():
        before = BACKENDS[backend](*inputs, position)
    BACKENDS[backend](*inputs, position).square().sum().backward()
    assert position.table.grad is not None
    assert position.table.grad.abs().max() > 0
    with torch.no_grad():
        position.table[:, 0] = 50.0
        after = BACKENDS[backend](*inputs, position)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, inputs[2], atol=1e-4, rtol=0)  # each token sees itself alone


def test_auto_takes_the_fastest_that_fits() -> None:
    for name in sorted(METHODS):
        position = position_method(name, 4)
        assert choose_backend("auto", position, CPU, torch.float32) == "sdpa"
        products = "sdpa" if name == "t5" else "matmul"
        assert choose_backend("auto", position, CPU, torch.bfloat16) == products
        assert choose_backend("auto", position, CPU, torch.bfloat16, 0.1) == "sdpa"
        fastest = "flex" if position.has_bias else "sdpa"
        assert choose_backend("auto", position, CUDA, torch.bfloat16) == fastest
    assert choose_backend("auto", LearnedBias(), CUDA, torch.bfloat16) == "sdpa"
    assert choose_backend("auto", LearnedBias(), CPU, torch.bfloat16) == "sdpa"
    for name in ("reference", "sdpa"):
        assert choose_backend(name, LearnedBias(), CPU, torch.float32) == name


UNAVAILABLE = [
    ("flex", "alibi", CPU, torch.bfloat16, "FlexAttention has no backward on CPU"),
    ("matmul", "alibi", CUDA, torch.bfloat16, "it is for CPUs"),
    ("matmul", "t5", CPU, torch.bfloat16, "T5's bias is trained"),
    ("matmul", "custom", CPU, torch.bfloat16, "LearnedBias's bias is trained"),
    ("flash", "alibi", CPU, torch.bfloat16, "FlashAttention-2 needs a GPU"),
    ("flex", "custom", CUDA, torch.bfloat16, "LearnedBias has no score_mod"),
    ("flash", "custom", CUDA, torch.bfloat16, "LearnedBias's bias is not linear"),
    ("flash", "t5", CUDA, torch.bfloat16, "T5's bias is not linear"),
    ("flash", "alibi", CUDA, torch.float32, "takes precision=bf16 or fp16, not fp32"),
]


@pytest.mark.parametrize(("name", "method", "device", "dtype", "reason"), UNAVAILABLE)
def test_what_cannot_work_is_refused_with_the_reason(
    name: str,
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", lambda _name: object())
    position = LearnedBias() if method == "custom" else position_method(method, 4)
    with pytest.raises(ConfigError) as caught:
        choose_backend(name, position, device, dtype)
    assert f"attention.backend={name}: " in str(caught.value)
    assert reason in str(caught.value)
    assert "use attention.backend=auto" in str(caught.value)


def test_flash_asks_for_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    alibi = position_method("alibi", 4)
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", lambda _name: None)
    reason = unavailable_reason("flash", alibi, CUDA, torch.bfloat16)
    assert reason == "the package flash-attn is not installed"
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", lambda _name: object())
    assert unavailable_reason("flash", alibi, CUDA, torch.bfloat16) is None

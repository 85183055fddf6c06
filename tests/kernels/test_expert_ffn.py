"""Experts' feed-forward networks: outputs and every gradient against plain torch in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from sparsetrain_kernels import expert_ffn, expert_ffn_backward, expert_ffn_forward, moe_ffn
from sparsetrain_kernels.expert_ffn import blocks, reference
from sparsetrain_kernels.expert_ffn.rounding import num_rounded_rows, whole_tiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COUNTS = {
    "even": [4, 4, 4],
    "uneven": [1, 17, 6],
    "empty-first": [0, 5, 3],
    "empty-last": [9, 2, 0],
    "one-expert": [0, 23, 0],
    "one-row": [0, 0, 1],
    "no-rows": [0, 0, 0],
}
counts = pytest.mark.parametrize("counts", [pytest.param(c, id=name) for name, c in COUNTS.items()])
forms = pytest.mark.parametrize(
    ("activation", "bias"), [("swiglu", False), ("gelu", False), ("gelu", True)], ids=["swiglu", "gelu", "gelu-bias"]
)
precisions = pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.5e-2)],
    ids=["fp64", "fp32", "bf16"],
)


@dataclass(frozen=True)
class Case:
    """Random tokens, rows and weights of three experts."""

    counts: list[int]
    activation: str
    bias: bool
    num_tokens: int = 11
    dim: int = 10
    ffn_dim: int = 14

    @property
    def token_R(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.num_tokens, (sum(self.counts),), generator=generator)

    @property
    def counts_E(self) -> Tensor:
        return torch.tensor(self.counts)

    def weights(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        in_dim = self.ffn_dim * (2 if self.activation == "swiglu" else 1)
        shapes = [(in_dim, self.dim), (self.dim, self.ffn_dim), (in_dim,), (self.dim,)]
        return [random(3, *shape, seed=2, dtype=dtype) for shape in shapes[: 4 if self.bias else 2]]

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """x, weight_R, and the experts' weights."""
        x_TD = random(self.num_tokens, self.dim, seed=3, dtype=dtype)
        return [x_TD, random(sum(self.counts), seed=4, dtype=dtype), *self.weights(dtype)]

    def moe(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        token_R, counts_E = self.token_R, self.counts_E

        def call(x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
            options = dict(zip(("b_in", "b_out"), weights[2:], strict=False))
            return function(x, token_R, weight, counts_E, *weights[:2], activation=self.activation, **options)

        return call


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(call: Callable[..., Tensor], grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradient by every input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype), materialize_grads=True)]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """Within `bound` of each tensor's largest value."""
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=bound * largest)


@pytest.fixture(params=[False, True], ids=["one-block", "small-blocks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts' rows whole, and cut into blocks of at most 5."""
    if request.param:
        monkeypatch.setattr(blocks, "_FEWEST_ROWS", 5)
        monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1)
        monkeypatch.setattr(blocks, "TILE_ROWS", 1)


@counts
@forms
@precisions
def test_moe_ffn_and_its_gradients_equal_plain_torch(
    counts: list[int], activation: str, bias: bool, dtype: torch.dtype, bound: float, cut: None
) -> None:
    case = Case(counts, activation, bias)
    inputs, dy_TD = case.inputs(dtype), random(case.num_tokens, case.dim, seed=5, dtype=dtype)
    ours = gradients(case.moe(moe_ffn), dy_TD, inputs)
    assert {t.dtype for t in ours} == {dtype}
    theirs = gradients(case.moe(reference.moe_ffn), dy_TD, [t.double() for t in inputs])
    assert_near(ours, theirs, bound)


@counts
@forms
@precisions
def test_expert_ffn_and_its_gradients_equal_plain_torch(
    counts: list[int], activation: str, bias: bool, dtype: torch.dtype, bound: float, cut: None
) -> None:
    case = Case(counts, activation, bias)
    x_RD, dy_RD = (random(sum(counts), case.dim, seed=seed, dtype=dtype) for seed in (6, 7))

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(x: Tensor, *weights: Tensor) -> Tensor:
            options = dict(zip(("b_in", "b_out"), weights[2:], strict=False))
            return function(x, case.counts_E, *weights[:2], activation=activation, **options)

        return of

    inputs = [x_RD, *case.weights(dtype)]
    ours = gradients(call(expert_ffn), dy_RD, inputs)
    theirs = gradients(call(reference.expert_ffn), dy_RD, [t.double() for t in inputs])
    assert_near(ours, theirs, bound)


@counts
@forms
def test_autocast_multiplies_in_bf16_and_returns_gradients_in_the_weights_dtype(
    counts: list[int], activation: str, bias: bool
) -> None:
    case = Case(counts, activation, bias)
    dy_TD = random(case.num_tokens, case.dim, seed=5)
    leaves = [t.requires_grad_() for t in case.inputs(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = case.moe(moe_ffn)(*leaves)
    found = torch.autograd.grad(y_TD, leaves, dy_TD.to(torch.bfloat16))
    assert y_TD.dtype == torch.bfloat16
    assert {t.dtype for t in found} == {torch.float32}
    theirs = gradients(case.moe(reference.moe_ffn), dy_TD, case.inputs())
    assert_near([y_TD.detach(), *found], theirs, 3e-2)


@counts
@forms
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.float64], ids=["same-dtype", "wider"])
def test_functions_on_lists_add_to_the_gradients_that_they_are_given(
    counts: list[int], activation: str, bias: bool, gradient_dtype: torch.dtype, cut: None
) -> None:
    case = Case(counts, activation, bias)
    x_RD, dy_RD = (random(sum(counts), case.dim, seed=seed, dtype=torch.float32) for seed in (6, 7))
    stacks = case.weights(torch.float32)
    lists = [list(w) for w in stacks] + [None] * (4 - len(stacks))
    y_RD, saved = expert_ffn_forward(x_RD, counts, *lists, activation)
    before = [random(*w.shape, seed=8, dtype=gradient_dtype) for w in stacks]
    after = [w.clone() for w in before]
    into = [list(w) for w in after] + [None] * (4 - len(stacks))
    dx_RD = expert_ffn_backward(dy_RD, x_RD, saved, counts, *lists, activation, *into)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        options = dict(zip(("b_in", "b_out"), weights[2:], strict=False))
        return expert_ffn(x, case.counts_E, *weights[:2], activation=activation, **options)

    y, dx, *dweights = gradients(call, dy_RD, [x_RD, *stacks])
    assert torch.equal(y_RD, y)
    assert torch.equal(dx_RD, dx)
    assert_near(after, [b + d.to(gradient_dtype) for b, d in zip(before, dweights, strict=True)], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@forms
def test_uninitialised_memory_is_never_read(
    activation: str, bias: bool, dtype: torch.dtype, cut: None, poisoned_memory: None
) -> None:
    case = Case([0, 13, 6], activation, bias)
    inputs, dy_TD = case.inputs(dtype), random(case.num_tokens, case.dim, seed=5, dtype=dtype)
    assert all(t.isfinite().all() for t in gradients(case.moe(moe_ffn), dy_TD, inputs))


@forms
def test_gradients_may_be_expanded_and_inputs_strided(activation: str, bias: bool) -> None:
    case = Case([3, 0, 8], activation, bias)
    inputs = case.inputs()
    strided = [t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in inputs]
    one = torch.ones((), dtype=torch.float64).expand(case.num_tokens, case.dim)
    assert_near(gradients(case.moe(moe_ffn), one, strided), gradients(case.moe(reference.moe_ffn), one, inputs), 1e-12)


def test_weights_without_gradient_get_none() -> None:
    case = Case([3, 2, 8], "gelu", bias=True)
    x, weight, *weights = case.inputs()
    case.moe(moe_ffn)(x.requires_grad_(), weight.requires_grad_(), *weights).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert all(w.grad is None for w in weights)


def test_equal_calls_give_bitwise_equal_results() -> None:
    case = Case([40, 0, 61], "swiglu", bias=False, num_tokens=50, dim=64, ffn_dim=96)
    inputs, dy_TD = case.inputs(torch.float32), random(50, 64, seed=5)
    first, second = (gradients(case.moe(moe_ffn), dy_TD, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@forms
def test_operators_pass_torchs_own_checks(activation: str, bias: bool) -> None:
    case = Case([3, 0, 2], activation, bias)
    leaves = [t.requires_grad_() for t in case.inputs(torch.float32)]
    x_TD, weight_R, *weights = leaves
    weights += [None] * (4 - len(weights))
    routing = case.token_R, weight_R, case.counts_E
    for x in (x_TD, x_TD.detach().bfloat16().requires_grad_()):  # bf16 rows are rounded up
        torch.library.opcheck(torch.ops.sparsetrain.moe_ffn.default, (x, *routing, *weights, activation))
    x_RD = x_TD.detach()[case.token_R].bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.sparsetrain.expert_ffn.default, (x_RD, case.counts_E, *weights, activation))


def test_torch_compile_takes_it_whole() -> None:
    case = Case([3, 0, 2], "swiglu", bias=False)
    inputs, dy_TD = case.inputs(torch.float32), random(case.num_tokens, case.dim, seed=5)
    compiled = torch.compile(case.moe(moe_ffn), backend="aot_eager", fullgraph=True)
    assert_near(gradients(compiled, dy_TD, inputs), gradients(case.moe(moe_ffn), dy_TD, inputs), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation = relu: expected swiglu or gelu"),
        ({"activation": "gelu"}, r"w_in has shape \(3, 28, 10\): expected \(3, 14, 10\)"),
        ({"counts": [3, 2]}, r"counts_E has shape \(2,\): expected \(3,\)"),
        ({"counts": [3, 2, 4]}, "counts add up to 9 rows, and there are 5"),
    ],
    ids=["activation", "w_in", "experts", "rows"],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    case = Case([3, 0, 2], "swiglu", bias=False)
    x, weight, *weights = case.inputs()
    wrong = replace(case, **change)  # type: ignore[arg-type]
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=message):
            moe_ffn(x.to(dtype), case.token_R, weight, wrong.counts_E, *weights, activation=wrong.activation)  # type: ignore[arg-type]


def test_weights_and_tokens_that_do_not_fit_are_refused() -> None:
    case = Case([3, 0, 2], "swiglu", bias=False)
    x, weight, w_in, w_out = case.inputs()
    calls = {
        r"w_out has shape \(10, 14\): expected \[E, D, F\]": (case.token_R, weight, case.counts_E, w_in, w_out[0]),
        "token_R is torch.int32 .*: expected int64": (case.token_R.int(), weight, case.counts_E, w_in, w_out),
        r"weight_R .*: expected floats of shape \(5,\)": (case.token_R, weight[:4], case.counts_E, w_in, w_out),
    }
    for message, arguments in calls.items():
        with pytest.raises(ValueError, match=message):
            moe_ffn(x, *arguments)
    with pytest.raises(ValueError, match="b_out = None, and the other is given: pass b_in and b_out, or neither"):
        expert_ffn(x, case.counts_E, w_in, w_out, b_in=w_in[:, :, 0])


def test_lists_that_do_not_fit_are_refused() -> None:
    case = Case([3, 0, 2], "swiglu", bias=False)
    x_RD = random(5, case.dim, seed=6, dtype=torch.float32)
    w_in, w_out = ([*w] for w in case.weights(torch.float32))
    with pytest.raises(ValueError, match="w_in has 3 entries for 2 counts: expected one for every expert"):
        expert_ffn_forward(x_RD, [3, 2], w_in, w_out, None, None, "swiglu")
    with pytest.raises(ValueError, match="activation = relu: expected swiglu or gelu"):
        expert_ffn_forward(x_RD, case.counts, w_in, w_out, None, None, "relu")


def test_rounded_rows_repeat_their_experts_last_row_without_weight() -> None:
    token_R, weight_R = torch.arange(70) + 100, torch.rand(70) + 1
    tiles = whole_tiles([3, 0, 66, 1], 70, torch.bfloat16, token_R.device)
    token_P, weight_P = tiles.spread(token_R), tiles.spread_with_zeros(weight_R)
    assert tiles.counts == [64, 0, 128, 64]
    assert tiles.place_R is not None
    assert tiles.place_R.tolist() == [0, 1, 2, *range(64, 130), 192]
    assert torch.equal(tiles.collect(token_P), token_R)
    assert torch.equal(tiles.collect(weight_P), weight_R)
    added = torch.ones(len(token_P), dtype=torch.bool).index_fill_(0, tiles.place_R, False)
    assert (weight_P[added] == 0).all()
    assert token_P[added].tolist() == [102] * 61 + [168] * 62 + [169] * 63
    assert len(token_P) <= num_rounded_rows(70, 4, torch.bfloat16, token_R.device)


def test_rows_are_rounded_only_where_products_are_compiled_for_their_shape() -> None:
    rows_R = torch.rand(5)
    tiles = whole_tiles([3, 2], 5, torch.float32, rows_R.device)
    assert tiles.counts == [3, 2]
    assert tiles.spread(rows_R) is tiles.spread_with_zeros(rows_R) is tiles.collect(rows_R) is rows_R


class _Shapes(TorchDispatchMode):
    """Notes the shapes of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in function.__name__:
            self.seen |= {tuple(each.shape) for each in args if isinstance(each, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_products_on_lists_repeat_their_shapes_whatever_the_counts() -> None:
    seen = []
    for counts in ([40, 0, 63], [1, 0, 7]):
        case = Case(counts, "swiglu", bias=False)
        x_RD = random(sum(counts), case.dim, seed=6, dtype=torch.bfloat16)
        (w_in, w_out), (dw_in, dw_out) = ([list(w) for w in case.weights(torch.bfloat16)] for _ in range(2))
        with _Shapes() as shapes:
            _, saved = expert_ffn_forward(x_RD, counts, w_in, w_out, None, None, "swiglu")
            expert_ffn_backward(x_RD, x_RD, saved, counts, w_in, w_out, None, None, "swiglu", dw_in, dw_out, None, None)
        seen.append(shapes.seen)
    assert seen[0] == seen[1] != set()


def test_blocks_are_whole_tiles_but_for_an_experts_last() -> None:
    found = blocks.blocks([1000, 0, 70], 1070, row_bytes=2**20)
    assert [(block.expert, block.rows, block.is_first) for block in found] == [
        (0, slice(0, 512), True),
        (0, slice(512, 1000), False),
        (2, slice(1000, 1070), True),
    ]

"""Block-sparse linear: every implementation against the expanded weight in float64, and what users may do wrong."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product

import pytest
import torch
from sparsetrain_kernels import memory
from sparsetrain_kernels.block_sparse_linear import WeightBlocks, block_sparse_linear, gather, reference
from sparsetrain_kernels.block_sparse_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT
from sparsetrain_kernels.block_sparse_linear.op import _linear
from torch import Tensor

from sparsetrain.testing import assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
CPU_IMPLEMENTATIONS = ("dense", "gather")


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    with ExitStack() as stack:
        for operation in (OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT):
            stack.enter_context(operation.force(implementation))
        yield


def random_layout(rows: int, columns: int, block: tuple[int, int], density: float = 0.4) -> WeightBlocks:
    """Random blocks, with a row and a column of blocks that are wholly dead."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < density
    mask[rows // 2] = False
    mask[:, columns // 3] = False
    return WeightBlocks.from_mask(mask, block)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def poison(weight: Tensor, layout: WeightBlocks) -> Tensor:
    """NaN in the dead blocks, which nothing may read."""
    alive = layout.unpack(torch.ones(layout.num_blocks, *layout.grid[2:])).bool()
    return weight.detach().masked_fill(~alive, torch.nan).requires_grad_()


def results(function: object, x: Tensor, weight: Tensor, layout: WeightBlocks, bias: Tensor | None) -> list[Tensor]:
    """Output and all gradients, against a fixed output gradient."""
    y = function(x, weight, layout, bias)  # type: ignore[operator]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return [y, *torch.autograd.grad(y, inputs, dy)]


def as_double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_()


SHAPES = {
    "one-block": (1, 1, (8, 8), 3),
    "wide-blocks": (5, 7, (4, 12), 10),
    "very-wide-blocks": (3, 4, (128, 130), 9),
    "odd": (7, 4, (5, 3), 11),
    "single-entries": (6, 9, (1, 1), 4),
    "one-token": (3, 6, (16, 16), 1),
    "no-token": (3, 6, (16, 16), 0),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense-stored", "packed"])
@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_equal_the_expanded_weights(
    shape: tuple[int, int, tuple[int, int], int], dtype: torch.dtype, implementation: str, packed: bool
) -> None:
    rows, columns, block, tokens = shape
    layout = random_layout(rows, columns, block, density=0.6)
    weight = poison(random(*layout.grid.shape, seed=0, dtype=dtype), layout)
    if packed:
        weight = layout.pack(weight).detach().requires_grad_()
    x, bias = (
        random(tokens, layout.grid.shape[1], seed=1, dtype=dtype),
        random(layout.grid.shape[0], seed=2, dtype=dtype),
    )
    with forced(implementation):
        found = results(block_sparse_linear, x, weight, layout, bias)
    expected = results(reference.block_sparse_linear, *map(as_double, (x, weight)), layout, as_double(bias))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_a_layout_without_blocks_gives_the_bias_and_zero_gradients(implementation: str) -> None:
    layout = WeightBlocks.from_mask(torch.zeros(2, 3, dtype=torch.bool), (4, 4))
    x, weight, bias = random(5, 12, seed=0), random(8, 12, seed=1), random(8, seed=2)
    with forced(implementation):
        y, dx, dw, _ = results(block_sparse_linear, x, weight, layout, bias)
    assert torch.equal(y, bias.expand(5, 8))
    assert not dx.any()
    assert not dw.any()


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_leading_dimensions_strides_and_expanded_gradients_make_no_difference(implementation: str) -> None:
    layout = random_layout(4, 5, (4, 6))
    weight = random(*layout.grid.shape, seed=0)
    x = random(30, 2, 3, seed=1).permute(1, 2, 0)  # not contiguous
    with forced(implementation):
        y = block_sparse_linear(x, weight, layout)
        (dw,) = torch.autograd.grad(y.sum(), weight)  # a gradient of strides 0
        flat = block_sparse_linear(x.reshape(6, 30).contiguous(), weight, layout)
        (dw_flat,) = torch.autograd.grad(flat, weight, torch.ones_like(flat))
    assert_close(y, flat.view(2, 3, 16))
    assert_close(dw, dw_flat)


def stored_tokens_last(x: Tensor) -> Tensor:
    """The same activations [..., X], in memory as [X, ...]."""
    return x.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(7, 4, (4, 6)), (3, 8, (4, 2)), (2, 3, (128, 128))], ids=["up", "down", "wide"]
)
def test_activations_may_be_stored_tokens_last(
    rows: int, columns: int, block: tuple[int, int], implementation: str, with_bias: bool
) -> None:
    layout = random_layout(rows, columns, block, density=0.6)
    outputs, inputs = layout.grid.shape
    x, weight = random(3, 5, inputs, seed=0), random(outputs, inputs, seed=1)
    bias = random(outputs, seed=2) if with_bias else None
    expected = results(reference.block_sparse_linear, x, weight, layout, bias)
    leaves = [weight, *([] if bias is None else [bias])]
    for stored, asked in product((x, stored_tokens_last(x)), (False, True)):
        with forced(implementation):
            y = block_sparse_linear(stored, weight, layout, bias, tokens_last=asked)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
            for dy_stored in (dy, stored_tokens_last(dy).detach()):
                found = [y, *torch.autograd.grad(y, [stored, *leaves], dy_stored, retain_graph=True)]
                for ours, theirs in zip(found, expected, strict=True):
                    assert_close(ours, theirs)
                assert y.stride() == ((5, 1, 15) if asked else (5 * outputs, outputs, 1))
                assert found[1].stride() == stored.stride()


def test_results_repeat_bitwise() -> None:
    layout = random_layout(4, 6, (16, 16))
    x, weight = random(33, 96, seed=0, dtype=torch.float32), random(64, 96, seed=1, dtype=torch.float32)
    with forced("gather"):
        first, second = (results(block_sparse_linear, x, weight, layout, None) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("block", [(8, 8), (128, 128)], ids=["narrow", "wide"])
def test_nothing_of_a_result_is_left_unwritten(monkeypatch: pytest.MonkeyPatch, block: tuple[int, int]) -> None:
    layout = random_layout(4, 6, block)
    new_empty, new_result = Tensor.new_empty, memory.new_result
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *args, **kw: new_empty(like, *args, **kw).fill_(torch.nan))
    monkeypatch.setattr(gather, "new_result", lambda like, *args, **kw: new_result(like, *args, **kw).fill_(torch.nan))
    outputs, inputs = layout.grid.shape
    x, weight, bias = random(7, inputs, seed=0), random(outputs, inputs, seed=1), random(outputs, seed=2)
    for packed, with_bias in product((False, True), repeat=2):
        with forced("gather"):
            stored = layout.pack(weight).detach().requires_grad_() if packed else weight
            found = results(block_sparse_linear, x, stored, layout, bias if with_bias else None)
            assert all(result.isfinite().all() for result in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", [(8, 16), (128, 128)], ids=["narrow", "wide"])
def test_tokens_taken_in_parts_give_the_same(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], dtype: torch.dtype
) -> None:
    layout = random_layout(4, 6, block)
    outputs, inputs = layout.grid.shape
    shapes = (22, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    with forced("gather"):
        at_once = results(block_sparse_linear, x, weight, layout, bias)
        for constant, value in {"_FEWEST_TOKENS": 4, "_READ_BYTES": 1, "_GATHERED_BYTES": 1}.items():
            monkeypatch.setattr(gather, constant, value)
        in_parts = results(block_sparse_linear, x, weight, layout, bias)
    for ours, theirs in zip(in_parts, at_once, strict=True):
        assert_close(ours.double(), theirs.double(), rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_a_dense_gradient_reaches_dead_blocks() -> None:
    layout = random_layout(3, 4, (8, 8))
    x, weight = random(10, 32, seed=0), random(24, 32, seed=1)
    y = block_sparse_linear(x, weight, layout, dense_gradient=True)
    (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert_close(dw, torch.ones_like(y).T @ x)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_weights() -> None:
    layout = random_layout(3, 4, (8, 8))
    x, weight = random(10, 32, seed=0, dtype=torch.float32), random(24, 32, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = block_sparse_linear(x, weight, layout)
    dx, dw = torch.autograd.grad(y.float().sum(), (x, weight))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("tokens_last", [False, True], ids=["tokens-first", "tokens-last"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense-stored", "packed"])
def test_the_operator_keeps_torchs_rules(packed: bool, tokens_last: bool) -> None:
    layout = random_layout(2, 3, (4, 4), density=0.8)
    weight = random(8, 12, seed=0, dtype=torch.float32)
    weight = layout.pack(weight).detach().requires_grad_() if packed else weight
    x = random(5, 12, seed=1, dtype=torch.float32)
    arguments = stored_tokens_last(x) if tokens_last else x, weight, random(8, seed=2, dtype=torch.float32)
    torch.library.opcheck(_linear, (*arguments, layout.index, list(layout.grid), False, False, tokens_last))


def test_a_whole_graph_compiles_forward_and_backward() -> None:
    layout = random_layout(2, 3, (4, 4), density=0.8)
    x, weight = random(5, 12, seed=0, dtype=torch.float32), random(8, 12, seed=1, dtype=torch.float32)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return block_sparse_linear(x, weight, layout).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(x, weight), (x, weight))
    for ours, theirs in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        assert_close(ours, theirs)


def test_packing_is_undone_and_masks_move_with_their_weights() -> None:
    before, after = random_layout(4, 5, (2, 3), 0.5), WeightBlocks.from_mask(torch.rand(4, 5) < 0.5, (2, 3))
    weight = random(8, 15, seed=0)
    packed = before.pack(weight)
    assert torch.equal(before.pack(before.unpack(packed)), packed)
    assert torch.equal(WeightBlocks.from_weight(before.unpack(packed), (2, 3)).to_mask(), before.to_mask())
    assert torch.equal(before.repack(packed, after), after.pack(before.unpack(packed)))
    nothing = WeightBlocks.from_mask(torch.zeros(4, 5, dtype=torch.bool), (2, 3))
    assert torch.equal(nothing.repack(nothing.pack(weight), after), torch.zeros(after.num_blocks, 2, 3))
    assert before.density == before.to_mask().float().mean()


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_a_weight_of_another_dtype_is_cast_and_its_gradient_is_of_its_own(implementation: str, packed: bool) -> None:
    layout = random_layout(4, 5, (8, 8))
    x, weight = random(6, 40, seed=0, dtype=torch.bfloat16), random(32, 40, seed=1, dtype=torch.float32)
    if packed:
        weight = layout.pack(weight).detach().requires_grad_()
    with forced(implementation):
        found = results(block_sparse_linear, x, weight, layout, None)
        expected = results(block_sparse_linear, x, weight.detach().bfloat16().requires_grad_(), layout, None)
    assert [one.dtype for one in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.bfloat16(), other)


LAYOUT = WeightBlocks.from_mask(torch.ones(2, 3, dtype=torch.bool), (4, 4))
MISTAKES = {
    "inputs": (lambda: block_sparse_linear(torch.ones(5, 11), torch.ones(8, 12), LAYOUT), r"x is \[5, 11\].*12 inputs"),
    "weight": (
        lambda: block_sparse_linear(torch.ones(5, 12), torch.ones(8, 13), LAYOUT),
        r"weight is \[8, 13\].*\[8, 12\]",
    ),
    "packed": (
        lambda: block_sparse_linear(torch.ones(5, 12), torch.ones(5, 4, 4), LAYOUT),
        r"\[5, 4, 4\].*\[6, 4, 4\]",
    ),
    "vector": (lambda: block_sparse_linear(torch.ones(5, 12), torch.ones(8), LAYOUT), r"weight is \[8\]"),
    "bias": (
        lambda: block_sparse_linear(torch.ones(5, 12), torch.ones(8, 12), LAYOUT, torch.ones(7)),
        r"bias is \[7\].*\[8\]",
    ),
    "dtype": (lambda: block_sparse_linear(torch.ones(5, 12).int(), torch.ones(8, 12), LAYOUT), r"x is torch.int32"),
    "device": (lambda: block_sparse_linear(torch.ones(5, 12, device="meta"), torch.ones(8, 12), LAYOUT), "x on meta"),
    "gradient": (
        lambda: block_sparse_linear(torch.ones(5, 12), torch.ones(6, 4, 4), LAYOUT, dense_gradient=True),
        "dense_gradient=True",
    ),
    "division": (
        lambda: WeightBlocks.from_weight(torch.ones(8, 12), (4, 5)),
        r"block=\(4, 5\) does not divide.*\[8, 12\]",
    ),
    "block": (lambda: WeightBlocks.from_mask(torch.ones(2, 2, dtype=torch.bool), (0, 4)), r"block=\(0, 4\)"),
    "mask": (lambda: WeightBlocks.from_mask(torch.ones(2, 2), (4, 4)), "mask is torch.float32"),
    "grid": (
        lambda: LAYOUT.repack(torch.ones(6, 4, 4), WeightBlocks.from_mask(torch.ones(2, 2, dtype=torch.bool), (4, 4))),
        "inside one grid",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]

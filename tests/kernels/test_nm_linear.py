"""N:M linear layers: masks, every implementation against the masked weight in float64, the module, and mistakes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsetrain_kernels.nm_linear import (
    NMLinear,
    NMPattern,
    NMSelection,
    gather,
    magnitude_mask,
    nm_linear,
    reference,
    sparsify_2_4,
    transposable_mask,
)
from sparsetrain_kernels.nm_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT
from sparsetrain_kernels.nm_linear.op import _linear
from torch import Tensor, nn

from sparsetrain.testing import assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@contextmanager
def forced(output: str, gradients: str | None = None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(OUTPUT.force(output))
        for operation in (INPUT_GRADIENT, WEIGHT_GRADIENT):
            stack.enter_context(operation.force(gradients or output))
        yield


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def as_double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_()


def results(function: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: object, **options: bool) -> list[Tensor]:
    """Output and all gradients, against a fixed output gradient."""
    y = function(x, weight, *rest, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    bias = [tensor for tensor in rest if isinstance(tensor, Tensor)]
    return [y, *torch.autograd.grad(y, [x, weight, *bias], dy)]


# Masks


def largest_by_sorting(weight: Tensor, pattern: NMPattern) -> Tensor:
    """The mask, one group at a time, in plain Python."""
    scores = weight.abs().double().view(-1, pattern.vector, weight.shape[1]).sum(1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, row_scores in enumerate(scores.tolist()):
        for start in range(0, len(row_scores), pattern.m):
            places = sorted(range(start, start + pattern.m), key=lambda place: (-row_scores[place], place))
            mask[row, places[: pattern.n]] = True
    return mask


@DTYPES
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:4", "3:5", "2:8", "4:64", "vector[3] 2:4", "vector[2] 1:8"])
def test_masks_keep_the_largest_and_of_equal_ones_the_first(pattern: str, dtype: torch.dtype) -> None:
    chosen = NMPattern.parse(pattern)
    weight = torch.randint(-2, 3, (6, 2 * chosen.m), generator=torch.Generator().manual_seed(0)).to(dtype)  # many ties
    assert torch.equal(magnitude_mask(weight, chosen), largest_by_sorting(weight, chosen))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=4, max_size=4))
def test_the_tournament_of_four_equals_sorting(four: list[float]) -> None:
    weight = torch.tensor([four])
    assert torch.equal(magnitude_mask(weight, NMPattern(2, 4)), largest_by_sorting(weight, NMPattern(2, 4)))


@DTYPES
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4)], ids=str)
def test_a_nan_is_kept_so_that_it_is_seen(pattern: NMPattern, dtype: torch.dtype) -> None:
    weight = torch.tensor([[torch.inf, 3.0, 2.0, -torch.nan]], dtype=dtype)
    assert magnitude_mask(weight, pattern)[0, 3]
    assert magnitude_mask(weight, pattern).sum() == pattern.n


@DTYPES
def test_sparsifying_gives_the_mask_the_values_and_their_places(dtype: torch.dtype) -> None:
    weight = random(5, 12, seed=0, dtype=dtype).detach()
    mask, values, offsets = sparsify_2_4(weight)
    selection = NMSelection.largest(weight, NMPattern(2, 4))
    assert torch.equal(mask, selection.mask())
    assert torch.equal(values, selection.compress(weight))
    firsts = torch.arange(0, 12, 4).repeat_interleave(2)
    assert torch.equal(offsets + firsts, selection.columns_GP)


def test_a_transposable_mask_is_the_best_of_all_ninety() -> None:
    weight = random(8, 12, seed=0).detach()
    mask = transposable_mask(weight)
    for one in (mask, mask.T):
        assert (one.reshape(one.shape[0], -1, 4).sum(-1) == 2).all()
    rows = [row for row in torch.cartesian_prod(*[torch.tensor([False, True])] * 4) if row.sum() == 2]
    squares = torch.stack(
        [torch.stack([rows[i] for i in chosen]) for chosen in torch.cartesian_prod(*[torch.arange(6)] * 4)]
    )
    squares = squares[(squares.sum(1) == 2).all(1)]
    assert len(squares) == 90
    blocks = weight.abs().view(2, 4, 3, 4).transpose(1, 2)
    best = (blocks[:, :, None] * squares).sum((-1, -2)).amax(-1)
    assert_close((weight.abs() * mask).view(2, 4, 3, 4).sum((1, 3)), best)


# Products

CASES = {  # pattern, outputs, inputs, tokens
    "2:4": (NMPattern(2, 4), 6, 12, 5),
    "3:5": (NMPattern(3, 5), 7, 15, 3),
    "1:64": (NMPattern(1, 64), 3, 128, 4),
    "4:4": (NMPattern(4, 4), 5, 8, 3),
    "vector 1:4": (NMPattern(1, 4, 64), 128, 24, 9),
    "vector[3] 2:6": (NMPattern(2, 6, 3), 9, 18, 300),  # more tokens than are gathered at once
    "one token": (NMPattern(1, 2, 4), 8, 6, 1),
    "no token": (NMPattern(1, 2, 4), 8, 6, 0),
}


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take few tokens and groups at a time, so that small tests see several."""
    monkeypatch.setattr(gather, "_GATHERED_BYTES", 256)
    monkeypatch.setattr(gather, "_TABLE_BYTES", 1)


def poisoned(case: tuple[NMPattern, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, NMSelection, Tensor]:
    """x, a weight with NaN where nothing may be read, its selection, bias."""
    pattern, outputs, inputs, tokens = case
    weight = random(outputs, inputs, seed=0, dtype=dtype)
    selection = NMSelection.largest(weight, pattern)
    weight = weight.detach().masked_fill(~selection.mask(), torch.nan).requires_grad_()
    return random(tokens, inputs, seed=1, dtype=dtype), weight, selection, random(outputs, seed=2, dtype=dtype)


def computed_by(pattern: NMPattern) -> list[tuple[str, str]]:
    """Implementations and forms of the weight that a pattern can be computed with."""
    found = [("dense", "whole"), ("dense", "compressed")]
    if pattern.vector > 1:
        return [*found, ("gather", "whole"), ("gather", "compressed")]
    return found if pattern.n == pattern.m else [*found, ("bag", "compressed")]


@pytest.mark.usefixtures("small_slices")
@DTYPES
@pytest.mark.parametrize(
    ("case", "implementation", "form"),
    [
        pytest.param(case, *way, id="-".join((name, *way)))
        for name, case in CASES.items()
        for way in computed_by(case[0])
    ],
)
def test_output_and_gradients_equal_the_masked_weights(
    case: tuple[NMPattern, int, int, int], implementation: str, form: str, dtype: torch.dtype
) -> None:
    x, weight, selection, bias = poisoned(case, dtype)
    if form == "compressed":
        weight = selection.compress(weight).detach().requires_grad_()
    with forced(implementation, "dense" if implementation == "bag" else None):
        found = results(nm_linear, x, weight, selection, bias)
    expected = results(reference.nm_linear, as_double(x), as_double(weight), selection, as_double(bias))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_the_straight_through_gradient_reaches_every_weight(implementation: str) -> None:
    x, weight, bias = random(7, 8, seed=0), random(6, 8, seed=1), random(6, seed=2)
    selection = NMSelection.largest(weight, NMPattern(1, 4, 3))
    with forced(implementation):
        found = results(nm_linear, x, weight, selection, bias, dense_gradient=True)
    for ours, theirs in zip(
        found, results(reference.nm_linear, x, weight, selection, bias, dense_gradient=True), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_groups_that_are_all_zero_give_zero_and_keep_their_first_inputs(implementation: str) -> None:
    weight = torch.zeros(4, 8, dtype=torch.float64, requires_grad=True)
    selection = NMSelection.largest(weight, NMPattern(1, 4, 2))
    assert selection.columns_GP.tolist() == [[0, 4]] * 2
    with forced(implementation):
        y, dx, dw = results(nm_linear, random(3, 8, seed=0), weight, selection)
    assert not y.any()
    assert not dx.any()
    assert torch.equal(dw != 0, selection.mask())


@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_leading_dimensions_strides_and_expanded_gradients_make_no_difference(implementation: str) -> None:
    weight = random(4, 8, seed=0)
    selection = NMSelection.largest(weight, NMPattern(1, 4, 2))
    x = random(8, 2, 3, seed=1).permute(1, 2, 0)  # not contiguous
    with forced(implementation):
        y = nm_linear(x, weight, selection)
        (dw,) = torch.autograd.grad(y.sum(), weight)  # a gradient of strides 0
        flat = nm_linear(x.reshape(6, 8).contiguous(), weight, selection)
        (dw_flat,) = torch.autograd.grad(flat, weight, torch.ones_like(flat))
    assert torch.equal(y, flat.view(2, 3, 4))
    assert torch.equal(dw, dw_flat)


def stored_tokens_last(x: Tensor) -> Tensor:
    """The same activations [..., X], in memory as [X, ...]."""
    return x.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("implementation", ["dense", "gather", "bag"])
def test_activations_may_be_stored_tokens_last(implementation: str, with_bias: bool) -> None:
    x, weight = random(3, 50, 16, seed=0), random(12, 16, seed=1)
    bias = random(12, seed=2) if with_bias else None
    selection = NMSelection.largest(weight, NMPattern(1, 4, 1 if implementation == "bag" else 6))
    if implementation == "bag":
        weight = selection.compress(weight).detach().requires_grad_()
    leaves = [x, weight, *([] if bias is None else [bias])]
    expected = results(reference.nm_linear, x, weight, selection, *leaves[2:])
    for stored, asked in product((x, stored_tokens_last(x)), (False, True)):
        with forced(implementation, "dense" if implementation == "bag" else None):
            y = nm_linear(stored, weight, selection, bias, tokens_last=asked)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
            for dy_stored in (dy, stored_tokens_last(dy).detach()):
                found = [y, *torch.autograd.grad(y, [stored, *leaves[1:]], dy_stored, retain_graph=True)]
                for ours, theirs in zip(found, expected, strict=True):
                    assert_close(ours, theirs)
                assert y.stride() == ((50, 1, 150) if asked else (600, 12, 1))
                assert found[1].stride() == stored.stride()


@pytest.mark.parametrize("implementation", ["gather", "bag"])
def test_results_repeat_bitwise_and_nothing_is_left_unwritten(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = random(33, 32, seed=0, dtype=torch.float32), random(16, 32, seed=1, dtype=torch.float32)
    selection = NMSelection.largest(weight, NMPattern(1, 4, 8 if implementation == "gather" else 1))
    values = selection.compress(weight).detach().requires_grad_()
    new_empty, empty = Tensor.new_empty, torch.empty
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *args, **kw: new_empty(like, *args, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty", lambda *args, **kw: empty(*args, **kw).fill_(torch.nan))
    with forced(implementation, "dense" if implementation == "bag" else None):
        first, second = (results(nm_linear, x, values, selection) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(result.isfinite().all() for result in first)


@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_a_weight_of_another_dtype_is_cast_and_its_gradient_is_of_its_own(implementation: str) -> None:
    x, weight = random(6, 8, seed=0, dtype=torch.bfloat16), random(32, 8, seed=1, dtype=torch.float32)
    selection = NMSelection.largest(weight.detach(), NMPattern(1, 4, 16))
    with forced(implementation):
        found = results(nm_linear, x, weight, selection)
        expected = results(nm_linear, x, weight.detach().bfloat16().requires_grad_(), selection)
    assert [one.dtype for one in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.bfloat16(), other)


def test_the_input_gradient_of_many_groups_is_summed_in_single_precision() -> None:
    weight = torch.full((512, 4), 2.0**-8, dtype=torch.bfloat16)
    weight[:8] = 1
    selection = NMSelection.largest(weight, NMPattern(1, 4, 8))
    x = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    with forced("gather"):
        (dx,) = torch.autograd.grad(nm_linear(x, weight, selection), x, torch.ones(1, 512, dtype=torch.bfloat16))
    assert dx[0, 0] == 10  # 8 + 63/32, rounded once; summed in bf16 it would stay at 8


@pytest.mark.parametrize("tokens_last", [False, True], ids=["tokens first", "tokens last"])
@pytest.mark.parametrize("form", ["whole", "compressed", "vector"])
def test_the_operator_keeps_torchs_rules(form: str, tokens_last: bool) -> None:
    x, weight, bias = (random(*shape, seed=0, dtype=torch.float32) for shape in ((5, 8), (4, 8), (4,)))
    if tokens_last:
        x = stored_tokens_last(x)
    pattern = NMPattern(1, 4, 2 if form == "vector" else 1)
    selection = NMSelection.largest(weight, pattern)
    if form == "compressed":
        weight = selection.compress(weight).detach().requires_grad_()
    mask, columns = selection.mask_GK, selection.columns_GP
    chosen = {"whole": (mask, None), "compressed": (None, columns), "vector": (mask, columns)}[form]
    torch.library.opcheck(_linear, (x, weight, bias, *chosen, [1, 4, pattern.vector, 0], False, False, tokens_last))


# The module


@pytest.mark.parametrize("pattern", ["2:4", "vector[2] 1:4"])
def test_the_module_trains_compiled_and_equals_the_reference(pattern: str) -> None:
    torch.manual_seed(0)
    layer = NMLinear(8, 4, pattern)
    x = random(5, 8, seed=0, dtype=torch.float32)
    compiled = torch.compile(lambda x: layer(x).square().sum(), fullgraph=True, backend="aot_eager")
    expected = reference.nm_linear(x, layer.weight, layer.selection, layer.bias, dense_gradient=True).square().sum()
    parameters = (x, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x), parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_close(ours, theirs)


def test_the_module_takes_the_place_of_a_linear_and_gives_it_back() -> None:
    linear = nn.Linear(8, 6)
    layer = NMLinear.from_linear(linear, "2:4", straight_through=False)
    assert layer.weight is linear.weight
    dense = layer.to_linear()
    assert torch.equal(dense.weight != 0, layer.selection.mask())
    x = torch.randn(3, 8)
    assert_close(layer(x), dense(x))
    (dw,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert not dw[~layer.selection.mask()].any()
    assert repr(layer) == "NMLinear(in_features=8, out_features=6, bias=True, pattern=2:4)"


def test_an_mlp_of_modules_stores_hidden_activations_tokens_last() -> None:
    up = NMLinear.from_linear(nn.Linear(8, 32), "vector[2] 1:4", tokens_last=True)
    down = NMLinear(32, 8, "vector[2] 1:4")
    x = torch.randn(5, 8, requires_grad=True)
    hidden = up(x).relu()
    assert hidden.stride() == (1, 5)
    y = down(hidden)
    expected = down.to_linear()(up.to_linear()(x).relu())
    assert_close(y, expected)
    assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)))


@pytest.mark.parametrize("options", [{"pattern": "2:4", "transposable": True}, {"pattern": "vector[4] 1:4"}], ids=str)
def test_refreshing_follows_the_weights_and_counts_what_changed(options: dict[str, object]) -> None:
    layer = NMLinear(8, 8, **options)  # type: ignore[arg-type]
    before = layer.selection
    assert layer.refresh() == 0
    with torch.no_grad():
        layer.weight.neg_().masked_fill_(before.mask(), 1e-6)
    changed = layer.refresh()
    assert changed == (layer.mask != before.mask_GK).sum() > 0
    dead = ~layer.selection.mask()
    probe = torch.randn(3, 8)
    expected = layer(probe)
    with torch.no_grad():
        layer.weight[dead] = torch.nan
    assert torch.equal(layer(probe), expected)


def test_a_loaded_mask_is_used_or_refused() -> None:
    layer, other = NMLinear(8, 4, "vector[2] 1:4"), NMLinear(8, 4, "vector[2] 1:4")
    layer(torch.randn(2, 8))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), other(x))
    damaged = other.state_dict()
    damaged["mask"] = ~damaged["mask"]
    with pytest.raises(ValueError, match=r"mask keeps 3 of inputs 0 to 3 of group 0: vector\[2\] 1:4 keeps 1"):
        layer.load_state_dict(damaged)


def test_the_module_moves_between_devices_and_is_built_on_meta() -> None:
    layer = NMLinear(8, 4, "vector[2] 1:4", device="meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    layer.refresh()
    assert layer(torch.randn(2, 8)).isfinite().all()


# Mistakes

MASK = torch.tensor([[True, False, False, False]] * 2)
SELECTION = NMSelection.from_mask(MASK, NMPattern(1, 4))
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "n above m": (lambda: NMPattern(5, 4), "pattern 5:4: n must be at least 1 and at most m"),
    "n of zero": (lambda: NMPattern(0, 4), "pattern 0:4"),
    "m above 64": (lambda: NMPattern(1, 65), "m at most 64"),
    "vector": (lambda: NMPattern(1, 4, 0), "vector=0"),
    "text": (lambda: NMPattern.parse("2 of 4"), "pattern '2 of 4': write n:m such as 2:4"),
    "inputs": (lambda: NMLinear(10, 4, "2:4"), "m=4 does not divide the 10 inputs"),
    "outputs": (lambda: NMLinear(8, 65, "vector 1:4"), "vector=64 does not divide the 65 outputs"),
    "not 2:4": (lambda: NMLinear(8, 8, "1:4", transposable=True), "transposable=True: masks of 1:4"),
    "squares": (lambda: transposable_mask(torch.ones(6, 8)), r"weight is \[6, 8\].*multiples of 4"),
    "sparsify": (lambda: sparsify_2_4(torch.ones(2, 6)), r"weight is \[2, 6\].*multiple of 4 inputs"),
    "group differs": (
        lambda: NMSelection.from_mask(MASK.clone().fill_diagonal_(True), NMPattern(1, 4, 2)),
        "group differ",
    ),
    "too many kept": (lambda: NMSelection.from_mask(MASK, NMPattern(2, 4)), "mask keeps 1 of inputs 0 to 3 of group 0"),
    "index": (lambda: NMSelection.from_columns(torch.tensor([[9]]), 8, NMPattern(1, 8)), "columns hold 9 to 9.*0 to 7"),
    "negative index": (lambda: NMSelection.from_columns(torch.tensor([[-1]]), 8, NMPattern(1, 8)), "columns hold -1"),
    "double index": (
        lambda: NMSelection.from_columns(torch.tensor([[1, 1]]), 4, NMPattern(2, 4)),
        "mask keeps 1 of inputs 0 to 3",
    ),
    "weight": (lambda: nm_linear(torch.ones(3, 4), torch.ones(2, 3), SELECTION), r"weight is \[2, 3\].*\[2, 4\] whole"),
    "x": (lambda: nm_linear(torch.ones(3, 5), torch.ones(2, 4), SELECTION), r"x is \[3, 5\].*4 inputs"),
    "bias": (lambda: nm_linear(torch.ones(3, 4), torch.ones(2, 4), SELECTION, torch.ones(3)), r"bias is \[3\]"),
    "dtype": (lambda: nm_linear(torch.ones(3, 4).int(), torch.ones(2, 4), SELECTION), "x is torch.int32"),
    "device": (lambda: nm_linear(torch.ones(3, 4, device="meta"), torch.ones(2, 4), SELECTION), "x on meta"),
    "gradient": (
        lambda: nm_linear(torch.ones(3, 4), torch.ones(2, 1), SELECTION, dense_gradient=True),
        "dense_gradient=True: a compressed weight",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_columns_and_masks_say_the_same() -> None:
    selection = NMSelection.largest(random(6, 8, seed=0), NMPattern(2, 4, 3))
    again = NMSelection.from_columns(selection.columns_GP, 8, selection.pattern)
    assert torch.equal(NMSelection.from_mask(again.mask(), selection.pattern).mask_GK, selection.mask_GK)


def test_a_pattern_is_written_as_it_is_read() -> None:
    for text in ("2:4", "vector[64] 1:4", "vector[16] 2:8"):
        assert str(NMPattern.parse(text)) == text
    assert NMPattern.parse("vector 1:4") == NMPattern(1, 4, 64)

"""SparseLinear and `use_sparse_linears`."""

import copy
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.nm_linear import NMPattern, magnitude_mask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparsetrain.config.sparsity import BlockShape
from sparsetrain.errors import SparsityError
from sparsetrain.models.sparse_linear import SparseLinear, kernel_pattern, pattern_text, use_sparse_linears
from sparsetrain.moe.feed_forward import Activation, FeedForward

PATTERNS = [BlockShape(16, 16), NMPattern(2, 4), NMPattern(1, 8), NMPattern(1, 4, 16)]


def mask_of(weight_OI: Tensor, pattern: BlockShape | NMPattern) -> Tensor:
    if isinstance(pattern, NMPattern):
        return magnitude_mask(weight_OI, pattern).repeat_interleave(pattern.vector, 0)
    units = torch.rand(weight_OI.shape[0] // pattern.rows, weight_OI.shape[1] // pattern.cols) < 0.4
    return units.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)


def masked_model(pattern: BlockShape | NMPattern) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).double()
    mask = mask_of(model[0].weight, pattern)
    with torch.no_grad():
        model[0].weight.mul_(mask)
    return model, mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_outputs_and_gradients_are_those_of_masked_dense_ones(
    pattern: BlockShape | NMPattern, implementation: str
) -> None:
    dense, mask = masked_model(pattern)
    sparse = copy.deepcopy(dense)
    use_sparse_linears(sparse)
    sparse[0].zeros_follow(pattern_text(pattern))
    x = torch.randn(3, 7, 64, dtype=torch.float64, requires_grad=True)
    y, dx, gradients = _run(dense, x)
    kind = "block_sparse_linear" if isinstance(pattern, BlockShape) else "nm_linear"
    products = [dispatch.OPERATIONS[f"{kind}.{what}"] for what in ("output", "input_gradient", "weight_gradient")]
    if isinstance(pattern, NMPattern) and pattern.vector == 1:
        implementation = "dense"  # the only one there is on a CPU
    with products[0].force(implementation), products[1].force(implementation), products[2].force(implementation):
        found_y, found_dx, found = _run(sparse, x)
    torch.testing.assert_close(found_y, y)
    torch.testing.assert_close(found_dx, dx)
    torch.testing.assert_close(found["0.weight"], gradients["0.weight"] * mask)
    for name in ("0.bias", "2.weight", "2.bias"):
        torch.testing.assert_close(found[name], gradients[name])


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    y = model(x)
    dx, *gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return y, dx, dict(zip(dict(model.named_parameters()), gradients, strict=True))


def sparse_model(pattern: str) -> nn.Sequential:
    model, _ = masked_model(kernel_pattern(pattern))
    use_sparse_linears(model, ["0.weight"])
    model[0].zeros_follow(pattern)
    return model


def test_zeros_are_found_anew_once_they_moved() -> None:
    layer, x = sparse_model("block[16,16]")[0], torch.randn(5, 64, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.weight[:16, :16] = 0.0
    layer.masks_changed()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_loaded_weights_bring_their_zeros() -> None:
    model, (other, _) = sparse_model("vector[16] 1:4"), masked_model(NMPattern(1, 4, 16))
    with torch.no_grad():
        other[0].weight.copy_(other[0].weight.roll(16, 0))
    x = torch.randn(5, 64, dtype=torch.float64)
    model(x)
    model.load_state_dict(other.state_dict())
    with dispatch.OPERATIONS["nm_linear.output"].force("gather"):
        torch.testing.assert_close(model(x), other(x))


def test_a_weight_of_zeros_runs_whole_and_learns() -> None:
    model = sparse_model("block[16,16]").float()
    nn.init.zeros_(model[0].weight)
    model[0].masks_changed()
    model(torch.randn(4, 64)).sum().backward()
    assert bool((model[0].weight.grad != 0).any())


def test_names_and_parameters_stay() -> None:
    model, _ = masked_model(NMPattern(2, 4))
    before = dict(model.named_parameters())
    use_sparse_linears(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(isinstance(model[at], SparseLinear) for at in (0, 2))


def test_zeros_that_follow_nothing_may_grow() -> None:
    model = sparse_model("2:4")
    assert "pattern=2:4" in repr(model)
    model[0].zeros_follow(None)
    x = torch.randn(2, 64, dtype=torch.float64)
    model(x).square().sum().backward()
    assert bool((model[0].weight.grad[model[0].weight == 0] != 0).all())


@pytest.mark.parametrize("name", ["1.weight", "0.bias", "7.weight"])
def test_names_of_no_linear_layer_are_refused(name: str) -> None:
    model, _ = masked_model(NMPattern(2, 4))
    with pytest.raises(SparsityError, match=f"{name}: is not the weight of an nn.Linear"):
        use_sparse_linears(model, ["0.weight", name])
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("1:40", r"1:40 does not divide a weight of shape \[96, 64\]"),
        ("vector 2:4", r"vector\[64\] 2:4 does not divide"),
        ("block[16,48]", r"block\[16,48\] does not divide"),
    ],
)
def test_patterns_that_do_not_divide_are_refused(pattern: str, message: str) -> None:
    model, _ = masked_model(NMPattern(2, 4))
    use_sparse_linears(model)
    with pytest.raises(SparsityError, match=message):
        model[0].zeros_follow(pattern)


def mlp(pattern: str | None, activation: Activation = "swiglu") -> FeedForward:
    """A feed-forward layer of SparseLinears whose weights follow a pattern."""
    torch.manual_seed(0)
    layer = FeedForward(32, 64, activation, bias=True).double()
    use_sparse_linears(layer)
    for linear in layer.children():
        if pattern is not None:
            with torch.no_grad():
                linear.weight.mul_(mask_of(linear.weight, kernel_pattern(pattern)))
            linear.zeros_follow(pattern)
    return layer


def times(tokens_last: float) -> dispatch.Table:
    """Dense takes 4 s, a gathered product 2 s, or so many of activations that are stored tokens last."""
    found = dispatch.Table("made up")
    kinds = ("nm_linear", "vector[16] 1:4", 0.25), ("block_sparse_linear", "16x16", 1.0)
    for (kind, variant, density), name in product(kinds, ("output", "input_gradient", "weight_gradient")):
        for words, seconds in (("", 2.0), (", tokens last", tokens_last)):
            for sizes in ((21, 64, 32), (21, 32, 64)):
                case = f"{kind}.{name}", variant + words, "cpu", torch.float64, sizes, density, torch.get_num_threads()
                found.times[dispatch.Problem(*case)] = {"dense": 4.0, "gather": seconds}
    return found


@pytest.fixture
def made_up_times(request: pytest.FixtureRequest) -> Iterator[None]:
    dispatch.use_table("cpu", times(request.param))
    yield
    dispatch.use_table("cpu", None)


@pytest.mark.parametrize(
    ("made_up_times", "is_last"), [(1.0, True), (3.0, False)], ids=["faster", "slower"], indirect=["made_up_times"]
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("pattern", ["vector[16] 1:4", "block[16,16]"])
@pytest.mark.usefixtures("made_up_times")
def test_an_mlp_stores_what_lies_between_its_layers_as_is_fastest(
    pattern: str, activation: Activation, is_last: bool
) -> None:
    layer, dense = mlp(pattern, activation), mlp(None, activation)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
    strides: dict[str, tuple[int, ...]] = {}
    for name, linear in layer.named_children():
        linear.register_forward_hook(lambda m, args, y, name=name: strides.update({name: y.stride()}))
    expected_y, expected_dx, expected = _run(dense, x)
    for decided in (False, is_last):  # in the first pass the layers find out where their zeros are
        y, dx, found = _run(layer, x)
        wide = (7, 1, 21) if decided else (448, 64, 1)
        assert strides.pop("down") == (224, 32, 1)
        assert set(strides.values()) == {wide}
        torch.testing.assert_close(y, expected_y)
        torch.testing.assert_close(dx, expected_dx)
        for name, gradient in found.items():
            alive = layer.get_parameter(name) != 0 if name.endswith("weight") else 1
            torch.testing.assert_close(gradient, expected[name] * alive)
    assert layer.down.is_beside_tokens_last == is_last
    layer.up.masks_changed()
    assert not layer.down.is_beside_tokens_last


@pytest.mark.parametrize("made_up_times", [1.0], indirect=True)
@pytest.mark.usefixtures("made_up_times")
def test_activations_stay_as_they_are_where_nothing_was_measured_or_a_layer_is_dense() -> None:
    layer = mlp("vector[16] 1:4")
    x = torch.randn(21, 32, dtype=torch.float64)
    layer(x)
    assert layer.up(x).stride() == (1, 21)
    assert layer.up(x[:5]).stride() == (64, 1)  # too few to be near what was measured
    assert layer.up(x).stride() == (1, 21)
    layer.gate.zeros_follow(None)
    layer(x)
    assert layer.up(x).stride() == (64, 1)


@pytest.mark.parametrize("made_up_times", [1.0], indirect=True)
@pytest.mark.usefixtures("made_up_times")
def test_an_mlp_compiles_once_for_numbers_of_tokens_that_are_alike() -> None:
    torch.compiler.reset()
    layer = mlp("vector[16] 1:4")
    inputs = [torch.randn(tokens, 32, dtype=torch.float64) for tokens in (21, 18, 25, 30)]
    expected = [layer(x) for x in inputs]
    assert layer.up.is_beside_tokens_last
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for x, y in zip(inputs, expected, strict=True):
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), y)
    assert counter.frame_count == 1

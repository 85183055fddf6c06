"""SparseLinear and `use_sparse_linears`."""

import copy
from collections.abc import Iterator

import pytest
import torch
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.nm_linear import NMPattern, magnitude_mask
from torch import Tensor, nn

from sparsetrain.config.sparsity import BlockShape
from sparsetrain.errors import SparsityError
from sparsetrain.models.sparse_linear import SparseLinear, kernel_pattern, pattern_text, use_sparse_linears
from sparsetrain.moe.feed_forward import FeedForward

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


def mlp(pattern: str | None) -> FeedForward:
    """A feed-forward layer of SparseLinears whose weights follow a pattern."""
    torch.manual_seed(0)
    layer = FeedForward(32, 64).double()
    use_sparse_linears(layer)
    for linear in (layer.gate, layer.up, layer.down):
        if pattern is not None:
            with torch.no_grad():
                linear.weight.mul_(mask_of(linear.weight, kernel_pattern(pattern)))
            linear.zeros_follow(pattern)
    return layer


def times(tokens_last: float) -> dispatch.Table:
    """Dense takes 4 s, a gathered product 2 s, or so many of activations that are stored tokens last."""
    found = dispatch.Table("made up")
    for name in ("output", "input_gradient", "weight_gradient"):
        for words, seconds in (("", 2.0), (", tokens last", tokens_last)):
            for sizes in ((21, 64, 32), (21, 32, 64)):
                variant = f"vector[16] 1:4{words}"
                problem = dispatch.Problem(
                    f"nm_linear.{name}", variant, "cpu", torch.float64, sizes, 0.25, torch.get_num_threads()
                )
                found.times[problem] = {"dense": 4.0, "gather": seconds}
    return found


@pytest.fixture
def made_up_times(request: pytest.FixtureRequest) -> Iterator[None]:
    dispatch.use_table("cpu", times(request.param))
    yield
    dispatch.use_table("cpu", None)


@pytest.mark.parametrize(
    ("made_up_times", "is_last"), [(1.0, True), (3.0, False)], ids=["faster", "slower"], indirect=["made_up_times"]
)
@pytest.mark.usefixtures("made_up_times")
def test_an_mlp_stores_what_lies_between_its_layers_as_is_fastest(is_last: bool) -> None:
    layer, dense = mlp("vector[16] 1:4"), mlp(None)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
    strides: dict[str, tuple[int, ...]] = {}
    for name in ("gate", "up", "down"):
        getattr(layer, name).register_forward_hook(lambda m, args, y, name=name: strides.update({name: y.stride()}))
    assert layer.down.is_beside_tokens_last(21, torch.float64, "cpu") == is_last
    y, dx, found = _run(layer, x)
    expected_y, expected_dx, expected = _run(dense, x)
    wide = (7, 1, 21) if is_last else (448, 64, 1)
    assert strides == {"gate": wide, "up": wide, "down": (224, 32, 1)}
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected_dx)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name] * (layer.get_parameter(name) != 0))


@pytest.mark.parametrize("made_up_times", [1.0], indirect=True)
@pytest.mark.usefixtures("made_up_times")
def test_one_layer_of_another_pattern_leaves_activations_as_they_are() -> None:
    layer = mlp("vector[16] 1:4")
    assert layer.up.is_beside_tokens_last(21, torch.float64, "cpu")
    layer.gate.zeros_follow(None)
    assert not layer.up.is_beside_tokens_last(21, torch.float64, "cpu")
    assert layer.up(torch.randn(21, 32, dtype=torch.float64)).is_contiguous()
    assert not mlp("vector[16] 1:4").up.is_beside_tokens_last(21, torch.float64, "cuda")

"""The layer against Σ_e w_e(x) · expert_e(x), written out; and what its edges do."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.errors import MoeError
from sparsetrain.moe import Experts, ExpertSpec, MoELayer, Routing, auxiliary_loss, moe_layers
from sparsetrain.moe.routers import Router
from sparsetrain.testing import assert_close

FORMS = pytest.mark.parametrize(
    ("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", False), ("gelu", True)]
)


def naive_expert(experts: Experts, e: int, x_TD: Tensor) -> Tensor:
    w_in, w_out = experts.w_in[e], experts.w_out[e]
    h = x_TD @ w_in.T + (0 if experts.b_in is None else experts.b_in[e])
    if experts.spec.activation == "swiglu":
        gate, up = h[:, : experts.spec.ffn_dim], h[:, experts.spec.ffn_dim :]
        h = gate / (1 + torch.exp(-gate)) * up
    else:
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return h @ w_out.T + (0 if experts.b_out is None else experts.b_out[e])


def naive_layer(layer: MoELayer, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    ids = None if token_ids is None else token_ids.reshape(-1)
    routing = layer.router(x_TD, seq_len=x.shape[-2], token_ids_T=ids)
    weights_TE = torch.zeros(len(x_TD), routing.num_experts, dtype=x.dtype)
    weights_TE = weights_TE.index_put((routing.token_R, routing.expert_R), routing.weight_R)
    outputs = [weights_TE[:, e, None] * naive_expert(layer.experts, e, x_TD) for e in range(routing.num_experts)]
    shared = 0 if layer.shared is None else layer.shared(x_TD)
    return (sum(outputs) + shared).reshape(x.shape)


def assert_equals_naive(layer: MoELayer, x: Tensor, token_ids: Tensor | None = None) -> None:
    x = x.clone().requires_grad_()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    actual, expected = layer(x, token_ids), naive_layer(layer, x, token_ids)
    upstream = torch.randn_like(expected)
    assert_close(actual, expected)
    grads = (torch.autograd.grad(y, [x, *parameters], upstream, materialize_grads=True) for y in (actual, expected))
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


def build(dim: int = 6, ffn_dim: int = 5, num_experts: int = 4, top_k: int = 2, **options) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(dim, ffn_dim, num_experts, top_k, **options).double()


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@FORMS
@pytest.mark.parametrize(
    ("shape", "ffn_dim", "num_experts", "top_k"),
    [((2, 9, 6), 5, 4, 2), ((1, 1, 3), 1, 1, 1), ((7, 5), 3, 3, 3), ((2, 2, 3, 4), 7, 17, 5), ((3, 33, 8), 16, 8, 1)],
    ids=str,
)
def test_output_and_gradients_equal_the_sum_over_experts(activation, bias, shape, ffn_dim, num_experts, top_k):
    layer = build(shape[-1], ffn_dim, num_experts, top_k, activation=activation, bias=bias)
    assert_equals_naive(layer, activations(*shape))


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "expert_choice", "hash", "dense_to_sparse", "relu"])
@pytest.mark.parametrize("shared_experts", [0, 2])
def test_every_router_combines_experts_by_its_weights(router, shared_experts):
    layer = build(router=router, shared_experts=shared_experts)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_equals_naive(layer, activations(2, 9, 6), ids)


class Fixed(Router):
    """Every token to the given experts."""

    def __init__(self, num_experts: int, chosen: list[int]) -> None:
        super().__init__(num_experts, len(chosen))
        self.chosen = torch.tensor(chosen)

    def forward(self, x_TD, *, seq_len=None, token_ids_T=None):
        weights = x_TD[:, : self.top_k].sigmoid()
        return Routing.of_choices(self.chosen.expand(len(x_TD), -1), weights, self.num_experts)


@FORMS
@pytest.mark.parametrize("chosen", [[0], [3], [3, 1]], ids=str)
def test_all_tokens_on_few_experts_leave_the_others_without_gradient(activation, bias, chosen):
    layer = build(router=Fixed(4, chosen), activation=activation, bias=bias)
    assert_equals_naive(layer, activations(2, 9, 6))
    layer(activations(2, 9, 6)).sum().backward()
    idle = [e for e in range(4) if e not in chosen]
    assert not layer.experts.w_in.grad[idle].any()
    assert all(layer.experts.w_out.grad[e].any() for e in chosen)


@FORMS
def test_no_tokens_give_no_output_and_zero_gradients(activation, bias):
    layer = build(activation=activation, bias=bias, shared_experts=1)
    for shape in ((0, 6), (0, 5, 6), (2, 0, 6)):
        y = layer(activations(*shape).requires_grad_())
        assert y.shape == shape
        layer.zero_grad()
        y.sum().backward()
        assert all(not parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)], ids=str)
def test_any_leading_dimensions_will_do(shape):
    layer, x = build(), activations(*shape)
    assert_close(layer(x), layer(x.reshape(-1, 6)).reshape(shape))


def test_bf16_autocast_is_near_float32():
    torch.manual_seed(0)
    layer = MoELayer(32, 48, 4, 2, router=Fixed(4, [0, 2]), shared_experts=1)
    x = torch.randn(2, 40, 32)
    results = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x.to(torch.bfloat16) if enabled else x)
        y.float().square().sum().backward()
        results.append([y, *(parameter.grad for parameter in layer.parameters())])
    assert results[1][0].dtype == torch.bfloat16
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model_gives_the_same_losses_load_and_gradients(checkpointed):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped(moe):
        return checkpoint_wrapper(nn.Sequential(moe)) if checkpointed else moe

    plain = nn.Sequential(nn.Linear(6, 6), wrapped(build(aux_loss=0.1).float()), nn.Linear(6, 6))
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")
    for size in (3, 5):
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(activations(size, 7, 6).float()).square().sum() + auxiliary_loss(model)
            loss.backward()
            ((_, moe),) = moe_layers(model)
            results.append([loss, moe.load.take().values.float(), *(p.grad for p in model.parameters())])
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected)


def test_moe_layers_are_found_once_each_by_their_bare_paths():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    shared = build()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), checkpoint_wrapper(build())), "b": shared, "c": shared})
    assert [path for path, _ in moe_layers(model)] == ["a.1", "b"]
    assert moe_layers(model)[1][1] is shared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k = 5: must be between 1 and num_experts = 4"),
        ({"num_experts": 0}, "num_experts = 0: must be at least 1"),
        ({"dim": 0}, "dim = 0: must be at least 1"),
        ({"ffn_dim": -3}, "ffn_dim = -3: must be at least 1"),
        ({"activation": "relu"}, "activation = relu: expected swiglu or gelu"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0: must be above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor = nan: must be above 0"),
        ({"overflow": "spill"}, "overflow = spill: expected drop or pad"),
        ({"aux_loss": -0.1}, "aux_loss = -0.1: a weight must not be negative"),
        ({"z_loss": -1.0}, "z_loss = -1.0: a weight must not be negative"),
        ({"aux_scope": "batch"}, "aux_scope = batch: expected micro_batch or sequence"),
        ({"shared_experts": -1}, "shared_experts = -1: must not be negative"),
        ({"router": "sofmax_topk"}, "did you mean softmax_topk"),
        ({"router": "hash", "aux_loss": 0.1}, "aux_loss = 0.1: HashRouter has no such loss"),
        ({"router": "expert_choice", "aux_loss": 0.1}, "aux_loss = 0.1: ExpertChoiceRouter has no such loss"),
        ({"router": "hash", "z_loss": 0.1}, "z_loss = 0.1: HashRouter has no such loss"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(MoeError, match=message):
        MoELayer(**{"dim": 6, "ffn_dim": 5, "num_experts": 4, **arguments})


def test_an_expert_counts_its_parameters():
    assert ExpertSpec(6, 5).numel == 3 * 6 * 5
    assert ExpertSpec(6, 5, "gelu", bias=True).numel == 2 * 6 * 5 + 6 + 5
    assert ExpertSpec(6, 5, "swiglu", bias=True).numel == 3 * 6 * 5 + 6 + 2 * 5

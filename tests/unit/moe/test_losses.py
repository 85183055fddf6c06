"""Balance and z-loss: their equations, gradients and scale; each forward pass counts once."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from sparsetrain.errors import MoeError
from sparsetrain.moe import MoELayer, auxiliary_loss
from sparsetrain.moe.losses import balance_loss, z_loss
from sparsetrain.parallel import MoEController
from sparsetrain.testing import assert_close

BATCH, SEQ_LEN, DIM = 8, 5, 6


def layer(**options) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(DIM, 4, num_experts=4, top_k=2, **{"aux_loss": 0.3, "z_loss": 0.2, **options}).double()


def inputs(batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, SEQ_LEN, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive_losses(moe: MoELayer, x: torch.Tensor) -> tuple[float, float]:
    """Mean balance and z-loss of a group of tokens [T, D], from the equations."""
    logits = (x @ moe.router.weight.T).tolist()
    exps = [[math.exp(value) for value in row] for row in logits]
    scores = [[value / sum(row) for value in row] for row in exps]
    num_experts, top_k = moe.router.num_experts, moe.router.top_k
    chosen = [sorted(range(num_experts), key=lambda e, row=row: -row[e])[:top_k] for row in scores]
    f = [sum(e in picks for picks in chosen) / (len(x) * top_k) for e in range(num_experts)]
    p = [sum(row[e] for row in scores) / len(x) for e in range(num_experts)]
    balance = num_experts * sum(a * b for a, b in zip(f, p, strict=True))
    return balance, sum(math.log(sum(row)) ** 2 for row in exps) / len(x)


def test_losses_equal_their_equations():
    moe, x = layer(), inputs()
    moe(x)
    balance, z = naive_losses(moe, x.reshape(-1, DIM))
    assert auxiliary_loss(moe).item() == pytest.approx(0.3 * balance + 0.2 * z)
    moe(x)
    assert auxiliary_loss(moe, "sum").item() == pytest.approx(BATCH * SEQ_LEN * (0.3 * balance + 0.2 * z))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_layer_called_twice_costs_what_two_layers_do(reduction):
    moe, (first, second) = layer(), inputs().split([3, 5])
    alone = []
    for x in (first, second):
        moe(x)
        alone.append(auxiliary_loss(moe, reduction))
    moe(first)
    with torch.no_grad():
        moe(second)  # an evaluation in between changes nothing
    moe(second)
    assert_close(auxiliary_loss(moe, reduction), sum(alone))
    assert auxiliary_loss(moe, reduction).item() == 0


def test_losses_that_nobody_takes_are_gone_after_a_step():
    moe = layer()
    controller = MoEController(moe, torch.optim.SGD(moe.parameters(), lr=0.1))
    moe(inputs()).sum().backward()
    controller.after_step()
    assert auxiliary_loss(moe).item() == 0


def test_balance_by_sequence_is_the_mean_over_sequences():
    moe, x = layer(aux_scope="sequence", z_loss=0.0), inputs()
    moe(x)
    expected = sum(naive_losses(moe, sequence)[0] for sequence in x) / BATCH
    assert auxiliary_loss(moe).item() == pytest.approx(0.3 * expected)


def test_ranks_that_share_the_tokens_of_a_call_add_up_to_its_balance_loss():
    moe, x_TM = layer(), inputs().flatten(0, 1)
    together = moe.router(x_TM)
    counts = torch.bincount(together.expert_R, minlength=together.num_experts)

    parts = [moe.router(part) for part in x_TM.chunk(2)]
    shared = [balance_loss(part, part.num_tokens, lambda counts_SE: counts_SE.copy_(counts)) for part in parts]

    assert_close(sum(shared), balance_loss(together, together.num_tokens))


def test_gradients_of_both_losses_are_exact():
    moe = layer()
    x = inputs(2).requires_grad_()

    def losses(x, weight):
        routing = torch.func.functional_call(moe.router, {"weight": weight}, (x.flatten(0, 1),))
        return balance_loss(routing, 2 * SEQ_LEN), balance_loss(routing, SEQ_LEN), z_loss(routing)

    # gradcheck passes over what has no gradient
    assert all(loss.requires_grad for loss in losses(x, moe.router.weight))
    assert torch.autograd.gradcheck(losses, (x, moe.router.weight))


@pytest.mark.parametrize(
    "options",
    [{"z_loss": 0.0}, {"aux_loss": 0.0}, {"router": "relu", "aux_loss": 0.0, "z_loss": 0.0}],
    ids=["balance", "z", "router"],
)
def test_the_gradient_of_each_loss_reaches_the_router_and_what_is_before_it(options):
    moe = layer(**options)

    def loss(x, weight):
        torch.func.functional_call(moe, {"router.weight": weight}, (x,))
        return auxiliary_loss(moe, "sum")

    x = inputs(1).requires_grad_()
    assert loss(x, moe.router.weight).requires_grad
    assert torch.autograd.gradcheck(loss, (x, moe.router.weight))


def test_an_even_load_costs_one_and_all_on_one_expert_costs_as_many_as_there_are():
    moe = layer(z_loss=0.0, aux_loss=1.0)
    moe.router.top_k = 1
    x = torch.eye(4, DIM, dtype=torch.float64).repeat(5, 1)
    moe.router.weight.data = 50 * torch.eye(4, DIM, dtype=torch.float64)
    moe(x)
    assert auxiliary_loss(moe).item() == pytest.approx(1.0)
    moe(x[:1])
    assert auxiliary_loss(moe).item() == pytest.approx(4.0)


def loss_and_gradient(moe: MoELayer, calls: list[torch.Tensor]) -> list[torch.Tensor]:
    moe.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for x in calls:
        moe(x)
        loss = auxiliary_loss(moe, "sum")
        loss.backward()
        total += loss.detach()
    return [total, moe.router.weight.grad]


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [1, 7], [3, 0, 5]], ids=str)
def test_by_sequence_the_sum_does_not_depend_on_how_a_batch_is_cut(sizes):
    moe, x = layer(aux_scope="sequence"), inputs()
    for actual, expected in zip(loss_and_gradient(moe, list(x.split(sizes))), loss_and_gradient(moe, [x]), strict=True):
        assert_close(actual, expected)


def test_by_micro_batch_the_sum_of_equal_calls_is_that_of_one_times_their_number():
    moe, x = layer(), inputs(2)
    once, thrice = loss_and_gradient(moe, [x]), loss_and_gradient(moe, [x, x, x])
    for one, three in zip(once, thrice, strict=True):
        assert_close(three, 3 * one)


class Block(nn.Module):
    """Something around a MoE layer, as activation checkpointing wraps it."""

    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.inner, self.moe = nn.Linear(DIM, DIM).double(), moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moe(self.inner(x)).tanh()


def train_once(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    block.zero_grad()
    y = block(x)
    aux = auxiliary_loss(block, "sum")
    (y.square().sum() + aux).backward()
    load = block.moe.load.take().values
    return [aux.detach(), load.double(), *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("form", ["function", "wrapper"])
def test_recomputation_counts_nothing_twice_and_changes_no_gradient(form):
    torch.manual_seed(0)
    block, x = Block(layer()), inputs().requires_grad_()
    expected = train_once(block, x)
    if form == "function":
        plain = block.forward
        block.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    else:
        block.moe = checkpoint_wrapper(block.moe)
    for actual, wanted in zip(train_once(block, x), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert auxiliary_loss(block).item() == 0


def test_a_reentrant_checkpoint_is_refused():
    block, x = Block(layer()), inputs().requires_grad_()
    y = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(MoeError, match="pass use_reentrant=False"):
        y.sum().backward()


def test_a_layer_can_be_copied_between_forward_and_backward():
    moe = layer()
    moe(inputs())
    copied = copy.deepcopy(moe)
    assert auxiliary_loss(copied).item() == 0
    assert torch.equal(copied.load.read().values, moe.load.read().values)
    assert auxiliary_loss(moe).item() > 0


def test_evaluation_leaves_no_loss_and_no_load():
    moe = layer()
    with torch.no_grad():
        moe(inputs())
    assert auxiliary_loss(moe).item() == 0
    assert not moe.load.take().values.any()


def test_the_losses_of_all_layers_add_up():
    model = nn.ModuleDict({"a": layer(), "b": nn.Sequential(layer(z_loss=0.0))})
    model["a"](inputs())
    model["b"](inputs())
    together = auxiliary_loss(model)
    apart = []
    for part in model.values():
        part(inputs())
        apart.append(auxiliary_loss(part))
    assert_close(together, sum(apart))


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "expert_choice", "dense_to_sparse", "relu"])
@pytest.mark.parametrize("shape", [(0, SEQ_LEN, DIM), (2, 0, DIM)], ids=["no-sequences", "empty-sequences"])
def test_no_tokens_cost_nothing(router, shape):
    moe = layer(router=router, aux_loss=0.0 if router == "expert_choice" else 1.0, aux_scope="sequence")
    moe(torch.zeros(shape, dtype=torch.float64))
    for reduction in ("mean", "sum"):
        moe(torch.zeros(shape, dtype=torch.float64))
        assert auxiliary_loss(moe, reduction).item() == 0


def test_tokens_without_any_expert_cost_nothing():
    moe = layer(router="relu", z_loss=0.0, aux_scope="sequence")
    moe.router.weight.data.fill_(-1.0)
    moe(inputs().abs())
    assert moe.load.take().counts_E.tolist() == [0, 0, 0, 0]
    ((loss, _),), penalty = moe.take_losses(), moe.router.config.locality_loss
    assert 0 <= loss.item() <= 0.1 * penalty  # neighbours that use the same experts, namely none


def test_nothing_is_computed_where_no_weight_is_set():
    moe = layer(aux_loss=0.0, z_loss=0.0)
    moe(inputs())
    assert moe.take_losses() == []

import pytest
import torch

from sparsetrain.moe import MoELayer, Routing
from sparsetrain.moe.capacity import limit_rows
from sparsetrain.testing import assert_close

EXPERTS = [[0, 1], [0, 2], [1, 0], [0, 3], [2, 0], [0, 1]]
"""Of six tokens; expert 0 is wanted by all of them."""


WEIGHTS = torch.arange(1.0, 13.0, dtype=torch.float64).view(6, 2)


def routing(weights: torch.Tensor = WEIGHTS) -> Routing:
    return Routing.of_choices(torch.tensor(EXPERTS), weights, num_experts=4)


def rows(of: Routing) -> list[tuple[int, int, float]]:
    return list(zip(of.expert_R.tolist(), of.token_R.tolist(), of.weight_R.tolist(), strict=True))


def test_the_earliest_tokens_of_a_full_expert_stay():
    limited = limit_rows(routing(), 1.0, "drop")  # ⌈12 / 4⌉ = 3 rows an expert
    assert limited.counts_E.tolist() == [3, 3, 2, 1]
    assert rows(limited) == [row for row in rows(routing()) if row[0] != 0 or row[1] < 3]
    assert limited.dropped.item() == 3


def test_padding_fills_every_expert_with_rows_that_weigh_nothing():
    limited = limit_rows(routing(), 1.0, "pad")
    assert limited.counts_E.tolist() == [3, 3, 3, 3]
    assert [row for row in rows(limited) if row[2]] == rows(limit_rows(routing(), 1.0, "drop"))
    assert [row[:2] for row in rows(limited) if not row[2]] == [(2, 5), (3, 5), (3, 5)]
    assert limited.dropped.item() == 3


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.3, 2.0, 100.0])
@pytest.mark.parametrize("overflow", ["drop", "pad"])
def test_capacity_is_the_mean_times_the_factor_rounded_up(factor, overflow):
    limited = limit_rows(routing(), factor, overflow)
    capacity = {0.5: 2, 0.75: 3, 1.0: 3, 1.3: 4, 2.0: 6, 100.0: 300}[factor]
    assert limited.dropped.item() == sum(max(count - capacity, 0) for count in [6, 3, 2, 1])
    if overflow == "pad":
        assert limited.counts_E.tolist() == [capacity] * 4


@pytest.mark.parametrize("overflow", ["drop", "pad"])
def test_no_rows_stay_no_rows(overflow):
    empty = Routing.of_choices(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), num_experts=4)
    limited = limit_rows(empty, 1.0, overflow)
    assert limited.counts_E.tolist() == [0, 0, 0, 0]
    assert len(limited.token_R) == len(limited.weight_R) == 0


@pytest.mark.parametrize("overflow", ["drop", "pad"])
def test_gradients_reach_the_weights_that_stay_and_no_others(overflow):
    weights = WEIGHTS.clone().requires_grad_()
    limit_rows(routing(weights), 1.0, overflow).weight_R.square().sum().backward()
    dropped = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [1, 0]])
    assert_close(weights.grad, 2 * WEIGHTS * (1 - dropped))


def test_a_layer_without_overflow_does_the_same_padded_or_not():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    outputs = []
    for options in ({}, {"capacity_factor": 4.0}, {"capacity_factor": 4.0, "overflow": "pad"}):
        torch.manual_seed(1)
        layer = MoELayer(6, 5, num_experts=4, top_k=2, **options).double()
        y = layer(x)
        y.square().sum().backward()
        outputs.append([y, *(parameter.grad for parameter in layer.parameters())])
        assert layer.load.take().dropped.item() == 0
    for other in outputs[1:]:
        for actual, expected in zip(other, outputs[0], strict=True):
            assert_close(actual, expected)


def test_padded_shapes_do_not_depend_on_the_values():
    layer = MoELayer(6, 5, num_experts=4, top_k=2, capacity_factor=1.5, overflow="pad")
    shapes = set()
    layer.experts.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[1].counts_E.tolist())))
    for seed in range(4):
        layer(torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(seed)))
    assert shapes == {(16, 16, 16, 16)}


def test_the_load_is_what_tokens_wanted_and_drops_are_counted_beside_it():
    layer = MoELayer(6, 5, num_experts=4, top_k=1, capacity_factor=1.0)
    layer.router.weight.data.zero_()[2] = 1.0
    x = torch.ones(2, 8, 6)
    layer(x)
    layer(x)
    load = layer.load.take()
    assert load.counts_E.tolist() == [0, 0, 32, 0]
    assert (load.num_tokens.item(), load.dropped.item()) == (32, 24)
    assert not layer.load.read().values.any()


def test_a_dropped_token_passes_without_what_its_expert_would_add():
    layer = MoELayer(6, 5, num_experts=4, top_k=1, capacity_factor=1.0)
    layer.router.weight.data.zero_()[2] = 1.0
    y = layer(torch.ones(8, 6))
    assert y[:2].abs().min() > 0
    assert not y[2:].any()

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sparsetrain.errors import ShardingError
from sparsetrain.sharding import (
    FlatPartition,
    WeightShard,
    clip_grads_,
    global_grad_norm,
    weight_shards,
)
from sparsetrain.sharding.shard import Rectangle
from sparsetrain.testing import assert_close


def shard_of(shape: tuple[int, ...], slices: tuple[slice, ...]) -> WeightShard:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    local = (whole.reshape(-1) if len(slices) == 1 and len(shape) != 1 else whole)[slices].contiguous()
    return WeightShard("w", shape, slices, None, 0, lambda: local, lambda: None, lambda: local, dict)


@st.composite
def shapes_and_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(shapes_and_ranges())
def test_rectangles_of_a_flat_range_cover_it_exactly_and_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    shard = shard_of(shape, (slice(start, stop),))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    covered = []
    for box in shard.rectangles():
        region = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        assert torch.equal(box.view(shard.local_weight()), region)
        covered.append(region.reshape(-1))
    expected = torch.arange(start, stop)
    assert torch.equal(torch.cat(covered) if covered else expected[:0], expected)
    assert len(shard.rectangles()) <= max(1, 2 * len(shape) - 1)


def test_global_indices_name_each_local_element() -> None:
    shard = shard_of((4, 5, 6), (slice(1, 3), slice(0, 5), slice(2, 6)))
    assert torch.equal(shard.global_indices(), shard.local_weight())
    flat = shard_of((4, 5, 6), (slice(17, 61),))
    assert torch.equal(flat.global_indices(), torch.arange(17, 61))
    assert shard.rectangles() == [Rectangle((1, 0, 2), (2, 5, 4), 0)]


def test_plain_parameters_are_described_with_live_gradients_and_moments() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    weight, bias = weight_shards(model, optimizer)
    assert (weight.name, weight.local_shape, bias.name) == ("weight", (4, 3), "bias")
    assert weight.local_grad() is None
    assert weight.local_moments() == {}
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert weight.local_grad() is model.weight.grad
    assert weight.local_moments().keys() == {"exp_avg", "exp_avg_sq"}
    weight.local_weight().zero_()
    assert model.weight.abs().sum() == 0


def test_shared_parameters_are_described_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [shard.name for shard in weight_shards(model)] == ["embed.weight"]


def test_wrappers_leave_no_trace_in_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False)))
    bare = [name for name, _ in model.named_parameters()]
    model[1] = checkpoint_wrapper(model[1])
    assert [shard.name for shard in weight_shards(nn.DataParallel(torch.compile(model)))] == bare


def test_a_users_own_attribute_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert [shard.name for shard in weight_shards(model)] == ["weight", "module.weight"]


def test_two_parameters_of_one_name_are_refused() -> None:
    model = nn.Module()
    model._orig_mod = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ShardingError, match="two parameters are called weight"):
        weight_shards(model)


def test_a_buffer_of_the_wrong_size_is_refused() -> None:
    partition = FlatPartition({"w": (3, 5)}, None, weight=lambda: torch.zeros(14), grad=lambda: None)
    with pytest.raises(ShardingError, match=r"\(14,\), expected \(15,\)"):
        partition.shards()


def test_norm_and_clipping_match_torch() -> None:
    model, twin = nn.Linear(7, 5), nn.Linear(7, 5)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 7)
    for net in (model, twin):
        net(x).square().sum().backward()
    shards = weight_shards(model)
    norm = global_grad_norm(shards)
    assert_close(norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
    clip_grads_(shards, 0.5, norm)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_a_small_gradient_is_not_clipped() -> None:
    model = nn.Linear(2, 2)
    model(torch.full((1, 2), 1e-3)).sum().backward()
    before = model.weight.grad.clone()
    shards = weight_shards(model)
    clip_grads_(shards, 100.0, global_grad_norm(shards))
    assert torch.equal(model.weight.grad, before)


def test_norm_of_no_gradients_is_zero() -> None:
    assert global_grad_norm(weight_shards(nn.Linear(2, 2))) == 0

"""Modules that stack several weights in one parameter: each weight has its own shard, in every layout."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import SparsityRule
from sparsetrain.sharding import Stack, global_grad_norm, weight_shapes, weight_shards
from sparsetrain.sparsity import Sparsifier, describe_parameters
from sparsetrain.testing import assert_close, run_distributed

NUM_EXPERTS, HIDDEN, DIM = 5, 6, 4


class Experts(nn.Module):
    """Two matrices side by side in each row of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(NUM_EXPERTS * 2 * HIDDEN * DIM, dtype=torch.float32)
        self.weight = nn.Parameter(torch.sin(values).view(NUM_EXPERTS, 2 * HIDDEN, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("td,ehd->teh", x, self.weight).square().sum()

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(names(path, "gate") + names(path, "up"), (HIDDEN, DIM))

    def shards_of_weights(self, path, moments, replica_rank):
        stack = Stack.of(self.weight, moments, replica_rank)
        gates = stack.shards_in_order(names(path, "gate"), slice(0, HIDDEN))
        return gates + stack.shards_in_order(names(path, "up"), slice(HIDDEN, 2 * HIDDEN))


def names(path: str, kind: str) -> list[str]:
    return [f"{path}.{expert}.{kind}" for expert in range(NUM_EXPERTS)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(DIM, DIM, bias=False)
        nn.init.eye_(self.project.weight)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.project(x))


def trained(model: nn.Module, callable_model: nn.Module, x: torch.Tensor):
    """Shards, norm and masks after two masked steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = SparsityRule(params=["*.gate", "*.up"], method="static", criterion="magnitude", sparsity=0.5)
    shards = weight_shards(callable_model, optimizer)
    sparsifier = Sparsifier([rule]).attach(model, optimizer, shards=shards)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        callable_model(x).backward()
        sparsifier.mask_gradients()
        norms.append(global_grad_norm(shards))
        optimizer.step()
    return shards, norms, sparsifier.masks()


def check_layouts() -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    x = torch.cos(torch.arange(8.0 * DIM)).view(8, DIM)
    mine = x.chunk(world_size)[rank]
    oracle = Model()
    expected, norms, masks = trained(oracle, oracle, x / world_size**0.5)  # means over ranks of sums of squares

    replicated = Model()
    sharded = fully_shard(Model(), mesh=init_device_mesh("cpu", (world_size,)))
    for model, callable_model in ((replicated, DistributedDataParallel(replicated)), (sharded, sharded)):
        found, found_norms, found_masks = trained(model, callable_model, mine)
        assert [shard.name for shard in found] == [shard.name for shard in expected]
        assert_close(torch.stack(found_norms), torch.stack(norms))
        for shard, wanted in zip(found, expected, strict=True):
            assert shard.global_shape == wanted.global_shape
            assert_close(shard.local_weight(), shard.cut(wanted.local_weight()))
            for key, moment in shard.local_moments().items():
                assert_close(moment, shard.cut(wanted.local_moments()[key]))
            if shard.name in masks:
                assert torch.equal(found_masks[shard.name], shard.cut(masks[shard.name]))
        held = torch.tensor([float(sum(shard.local_numel for shard in found if "experts" in shard.name))])
        if model is sharded:
            dist.all_reduce(held)
        assert held.item() == NUM_EXPERTS * 2 * HIDDEN * DIM


def test_each_stacked_weight_has_its_own_shard_in_every_layout() -> None:
    run_distributed(check_layouts, 2)


def test_names_and_shapes_are_those_of_the_single_weights() -> None:
    with torch.device("meta"):
        model = Model()
    shapes = weight_shapes(model)
    assert list(shapes)[:2] == ["project.weight", "experts.0.gate"]
    assert shapes["experts.4.up"] == (HIDDEN, DIM)
    described = {parameter.name: parameter for parameter in describe_parameters(model)}
    assert list(described) == list(shapes)
    assert not described["experts.4.up"].dense_by_default

"""Experts spread over ranks against all of them in one process: gradients, norms, losses, weights and moments."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.errors import PlacementError, ShardingError
from sparsetrain.moe import Experts, MoELayer, auxiliary_loss, moe_layers
from sparsetrain.moe.placement import Placement
from sparsetrain.parallel import MoEController, parallelize
from sparsetrain.parallel.fssdp.controller import runtimes_of
from sparsetrain.parallel.parallelize import set_gradient_sync
from sparsetrain.sharding import global_grad_norm, weight_shards
from sparsetrain.testing import assert_close, run_distributed

DIM, NUM_EXPERTS, TOKENS, STEPS = 8, 6, 12, 5


class Block(nn.Module):
    def __init__(self, router: str, **moe: Any) -> None:
        super().__init__()
        self.attention = nn.Linear(DIM, DIM)
        self.moe = MoELayer(DIM, 12, NUM_EXPERTS, 2, router=router, z_loss=0.001, **moe)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(torch.tanh(self.attention(x)))


class Model(nn.Module):
    """Three MoE layers; float64, so that no rounding flips a choice of experts."""

    def __init__(self, router: str = "softmax_topk", checkpointed: bool = False, **moe: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(Block(router, **moe) for _ in range(3)).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def batches(step: int, sizes: list[int]) -> list[Tensor]:
    """What each rank is given: as many tokens as `sizes` says, drawn so that experts are used unevenly."""
    x = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return list((x + 0.7).split(sizes))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() + auxiliary_loss(model, "sum")


class Trained:
    """A model after some steps, with what was seen on the way."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, norms: list[Tensor], loads: list[Any]):
        self.shards = weight_shards(model, optimizer)
        self.norms, self.loads = norms, loads


def train_alone(sizes: list[int], micro: int = 1, **options: Any) -> Trained:
    """The oracle: every rank's tokens through one model, gradients averaged over ranks."""
    model = Model(**options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller = MoEController(model, optimizer, group=alone())
    norms, loads = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            for x in batches(step * micro + part, sizes):
                (loss_of(model, x) / len(sizes)).backward()
        norms.append(global_grad_norm(weight_shards(model)))
        optimizer.step()
        loads.append(controller.report.load_LE)
    return Trained(model, optimizer, norms, loads)


_alone: list[dist.ProcessGroup] = []


def alone() -> dist.ProcessGroup:
    """A group of this rank only."""
    if not _alone:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _alone.append(groups[dist.get_rank()])
    return _alone[0]


def train_spread(
    sizes: list[int],
    kind: str,
    *,
    shard: str = "ddp",
    group_size: int | None = None,
    micro: int = 1,
    every_step: Callable[..., None] = lambda model, optimizer: None,
    fssdp: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trained, nn.Module]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = group_size or world_size
    mesh = init_device_mesh("cpu", (world_size // size, size)) if size < world_size else None
    bare = Model(**options)
    model = parallelize(bare, mesh, experts=kind, shard=shard, layers=bare.layers, options=FssdpConfig(**(fssdp or {})))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller = MoEController(model, optimizer)
    norms, loads = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            is_last = part == micro - 1
            set_gradient_sync(model, is_last)
            if shard == "full":
                bare.set_requires_gradient_sync(is_last)
            elif isinstance(model, nn.parallel.DistributedDataParallel):
                model.require_backward_grad_sync = is_last
            loss_of(model, batches(step * micro + part, sizes)[rank]).backward()
        norms.append(global_grad_norm(weight_shards(model)))
        optimizer.step()
        every_step(model, optimizer)
        loads.append(controller.report.load_LE)
    return Trained(model, optimizer, norms, loads), model


def assert_same(found: Trained, expected: Trained) -> None:
    assert_close(torch.stack(found.norms), torch.stack(expected.norms), rtol=1e-9)
    for ours, theirs in zip(found.loads, expected.loads, strict=True):
        np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))
    wanted = {shard.name: shard for shard in expected.shards}
    assert [shard.name for shard in found.shards] == list(wanted)
    for shard in found.shards:
        oracle = wanted[shard.name]
        assert_close(shard.local_weight(), shard.cut(oracle.local_weight()), rtol=1e-7, atol=1e-9)
        for key, moment in shard.local_moments().items():
            assert_close(moment, shard.cut(oracle.local_moments()[key]), rtol=1e-7, atol=1e-9)


def move_replicas(model: nn.Module, _: torch.optim.Optimizer) -> None:
    """Replicas at random, as no planner would choose them; the same on all ranks."""
    for runtime in runtimes_of(model):
        draw = np.random.default_rng(int(runtime.store.owners_LE.sum()) + len(runtime.placements))
        for at, placement in enumerate(runtime.placements):
            holders_ED = placement.holders_ED | (draw.random(placement.holders_ED.shape) < 0.4)
            runtime.placements[at] = Placement(runtime.store.owners_LE[at], holders_ED)


def move_everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """New owners, drawn at random, and replicas; each rank keeps its number of experts."""
    for runtime in runtimes_of(model):
        store = runtime.store
        draw = np.random.default_rng(int((store.owners_LE * np.arange(store.owners_LE.size).reshape(3, -1)).sum()))
        store.reshard(draw.permutation(store.owners_LE.ravel()).reshape(store.owners_LE.shape), optimizer)
    move_replicas(model, optimizer)


def check_layouts(sizes: list[int], layouts: list[dict[str, Any]], **options: Any) -> None:
    expected = train_alone(sizes, **options)
    for layout in layouts:
        found, model = train_spread(sizes, **layout, **options)
        assert_same(found, expected)
        assert len(runtimes_of(model)) == 1


FIXED = {"replan": "never", "reshard_every_steps": 0}
LAYOUTS: list[dict[str, Any]] = [
    {"kind": "ep"},
    {"kind": "ep", "shard": "full", "fssdp": {"pipeline": 2}},
    {"kind": "fssdp", "every_step": move_replicas, "fssdp": {**FIXED, "pipeline": 1}},
    {"kind": "fssdp", "every_step": move_replicas, "fssdp": {**FIXED, "pipeline": 4, "rematerialise": True}},
    {"kind": "fssdp", "shard": "full", "every_step": move_everything, "fssdp": {**FIXED, "dispatch": "paper"}},
    {"kind": "fssdp", "every_step": move_everything, "fssdp": {**FIXED, "rematerialise": True}},
    {"kind": "fssdp", "fssdp": {"replan": "always", "reshard_every_steps": 2, "placement": "paper"}},
]
UNEVEN = [9, 0, 14, 1]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_equals_that_of_one_process(world_size: int) -> None:
    run_distributed(check_layouts, world_size, UNEVEN[:world_size], LAYOUTS, timeout_s=150)


def check_accumulation_recompute_and_groups() -> None:
    sizes = [7, 3, 0, 5]
    layouts: list[dict[str, Any]] = [
        {"kind": "ep", "group_size": 2},
        {"kind": "fssdp", "group_size": 2, "fssdp": {"replan": "always", "rematerialise": True}},
        {"kind": "fssdp", "fssdp": {"replan": "always", "reshard_every_steps": 3}},
    ]
    check_layouts(sizes, layouts, micro=2, checkpointed=True)
    check_layouts(sizes, layouts[:2], router="sigmoid_topk")


@pytest.mark.slow
def test_groups_smaller_than_the_world_accumulation_and_recomputation_change_nothing() -> None:
    run_distributed(check_accumulation_recompute_and_groups, 4, timeout_s=150)


def check_bad_input() -> None:
    with pytest.raises(ShardingError, match="no MoELayer"):
        parallelize(nn.Linear(2, 2), experts="ep")
    with pytest.raises(PlacementError, match="1 experts cannot be spread over an expert group of 2 ranks"):
        parallelize(MoELayer(4, 4, 1, 1), experts="ep")
    mixed = nn.Sequential(MoELayer(4, 4, 2, 1), MoELayer(4, 4, 1, 1))
    with pytest.raises(PlacementError, match="1 experts"):
        parallelize(mixed, experts="ep")
    assert all(isinstance(layer.experts, Experts) for layer in mixed)  # it stays as it was
    with pytest.raises(ShardingError, match="experts='fsdp': expected ep, fssdp or None"):
        parallelize(Model(), experts="fsdp")
    with pytest.raises(ShardingError, match="shard='fsdp': expected ddp, full or None"):
        parallelize(Model(), experts="ep", shard="fsdp")
    model = parallelize(Model(), experts="ep", shard=None)
    with pytest.raises(ShardingError, match="spread over ranks already"):
        parallelize(model, experts="fssdp")
    with pytest.raises(ShardingError, match="3 dimensions"):
        parallelize(Model(), init_device_mesh("cpu", (1, 1, 2)), experts="ep")
    with pytest.raises(ShardingError, match="mesh_dim_names"):
        parallelize(Model(), init_device_mesh("cpu", (1, 2)), experts="ep", shard="full")
    model, first_rank = Model(), DeviceMesh("cpu", [0], mesh_dim_names=("experts",))
    with pytest.raises(ShardingError, match="a mesh of some of the ranks"):
        parallelize(model, first_rank, experts="ep")
    if dist.get_rank() == 1:
        with pytest.raises(ShardingError, match=r"rank 1 is none of the mesh's ranks \[0\]"):
            parallelize(model, first_rank, experts="ep", shard=None)
    assert all(isinstance(layer.experts, Experts) for _, layer in moe_layers(model))


def check_that_differing_plans_stop_all_ranks() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    runtime = runtimes_of(parallelize(model, experts="fssdp", shard=None, options=FssdpConfig(replan="never")))[0]
    controller = MoEController(model)
    x = batches(0, [4, 4])[dist.get_rank()]
    loss_of(model, x).backward()
    optimizer.step()
    if dist.get_rank() == 1:
        controller._planners[0]._forecast.update(np.eye(3, NUM_EXPERTS) * 1e6)
    message = r"ranks 0 and 1 place experts of layers\.\d\.moe\.experts differently: \[\[0\], .*\] and \["
    with pytest.raises(PlacementError, match=message):
        controller.after_step()
    runtime.placements = [Placement.of_owners(owner_E, 2) for owner_E in runtime.store.owners_LE]
    runtime._last_plan = (1, runtime.last_plans[dist.get_rank()])
    with pytest.raises(PlacementError, match=r"ranks 0 and 1 split rows of layers\.1\.moe\.experts differently"):
        model(x)


def check_faults() -> None:
    check_bad_input()
    check_that_differing_plans_stop_all_ranks()


def test_wrong_meshes_models_and_plans_are_refused() -> None:
    run_distributed(check_faults, 2, timeout_s=60)

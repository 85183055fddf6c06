"""Experts spread over ranks against all of them in one process: losses, clipped gradients, norms, weights, moments."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.config.moe import DenseToSparse, RouterConfig
from sparsetrain.errors import PlacementError, ShardingError
from sparsetrain.moe import Experts, MoELayer, auxiliary_loss, moe_layers
from sparsetrain.moe.placement import Placement
from sparsetrain.parallel import MoEController, parallelize
from sparsetrain.parallel.fssdp.controller import runtimes_of
from sparsetrain.parallel.parallelize import set_gradient_sync
from sparsetrain.sharding import clip_grads_, global_grad_norm, weight_shards
from sparsetrain.testing import assert_close, run_distributed

DIM, NUM_EXPERTS, STEPS, MAX_NORM = 8, 6, 5, 1.0


class Block(nn.Module):
    def __init__(self, hidden: int, router: str | RouterConfig, **moe: Any) -> None:
        super().__init__()
        self.attention = nn.Linear(DIM, DIM)
        z_loss = 0.0 if router == "hash" else 0.001
        self.moe = MoELayer(DIM, hidden, NUM_EXPERTS, 2, router=router, z_loss=z_loss, **moe)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.moe(torch.tanh(self.attention(x)), ids)


class Model(nn.Module):
    """Three MoE layers; float64, so that no rounding flips a choice of experts."""

    def __init__(
        self,
        router: str | RouterConfig = "softmax_topk",
        checkpointed: bool = False,
        hidden: tuple[int, ...] = (12, 12, 12),
        **moe: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(Block(each, router, **moe) for each in hidden).double()

    def forward(self, x: Tensor) -> Tensor:
        ids = x.detach()[:, 0].mul(1000).long().abs()  # a token's own, wherever it is computed
        for layer in self.layers:
            x = checkpoint(layer, x, ids, use_reentrant=False) if self.checkpointed else layer(x, ids)
        return x


def batches(step: int, sizes: list[int]) -> list[Tensor]:
    """What each rank is given: as many tokens as `sizes` says, drawn so that experts are used unevenly."""
    x = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return list((x + 0.7).split(sizes))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() + auxiliary_loss(model, "sum")


class Trained:
    """A model after some steps, with what was seen on the way."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, controller: MoEController) -> None:
        self.model, self.optimizer, self.controller = model, optimizer, controller
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.loads: list[Any] = []

    def step(self, losses: list[Tensor], norm: Tensor) -> None:
        """Update, and remember what the step was about."""
        self.norms.append(norm)
        self.optimizer.step()
        self.losses.append(torch.stack(losses).sum().detach())
        assert self.controller.report is not None
        self.loads.append(self.controller.report.load_LE)


def train_alone(sizes: list[int], micro: int = 1, **options: Any) -> Trained:
    """The oracle: every rank's tokens through one model, gradients averaged over ranks."""
    model = Model(**options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trained = Trained(model, optimizer, MoEController(model, optimizer, group=alone(), total_steps=STEPS))
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for part in range(micro):
            for x in batches(step * micro + part, sizes):
                losses.append(loss_of(model, x))
                (losses[-1] / len(sizes)).backward()
        trained.step(losses, nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
    return trained


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
) -> Trained:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = group_size or world_size
    mesh = init_device_mesh("cpu", (world_size // size, size)) if size < world_size else None
    bare = Model(**options)
    model = parallelize(bare, mesh, experts=kind, shard=shard, layers=bare.layers, options=FssdpConfig(**(fssdp or {})))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trained = Trained(model, optimizer, MoEController(model, optimizer, total_steps=STEPS))
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for part in range(micro):
            is_last = part == micro - 1
            set_gradient_sync(model, is_last)
            if shard == "full":
                bare.set_requires_gradient_sync(is_last)
            elif isinstance(model, nn.parallel.DistributedDataParallel):
                model.require_backward_grad_sync = is_last
            losses.append(loss_of(model, batches(step * micro + part, sizes)[rank]))
            losses[-1].backward()
        shards = weight_shards(model)
        norm = global_grad_norm(shards)
        clip_grads_(shards, MAX_NORM, norm)
        trained.step(losses, norm)
        every_step(model, optimizer)
        dist.all_reduce(trained.losses[-1])
    return trained


def assert_same(found: Trained, expected: Trained) -> None:
    assert min(expected.norms) > MAX_NORM
    for name in ("losses", "norms"):
        assert_close(torch.stack(getattr(found, name)), torch.stack(getattr(expected, name)), rtol=1e-9)
    for ours, theirs in zip(found.loads, expected.loads, strict=True):
        np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))
    wanted = {shard.name: shard for shard in weight_shards(expected.model, expected.optimizer)}
    shards = weight_shards(found.model, found.optimizer)
    assert [shard.name for shard in shards] == list(wanted)
    for shard in shards:
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
        draw = np.random.default_rng(
            int((store.owners_LE * np.arange(store.owners_LE.size).reshape(store.owners_LE.shape)).sum())
        )
        store.reshard(draw.permutation(store.owners_LE.ravel()).reshape(store.owners_LE.shape), optimizer)
    move_replicas(model, optimizer)


def check_layouts(sizes: list[int], layouts: list[dict[str, Any]], **options: Any) -> None:
    expected = train_alone(sizes, **options)
    for layout in layouts:
        found = train_spread(sizes, **layout, **options)
        assert_same(found, expected)
        assert len(runtimes_of(found.model)) == len(set(options.get("hidden", [12])))


FIXED = {"replan": "never", "reshard_every_steps": 0}
LAYOUTS: list[dict[str, Any]] = [
    {"kind": "ep"},
    {"kind": "ep", "group_size": 1},
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
    run_distributed(check_layouts, world_size, UNEVEN[:world_size], LAYOUTS, timeout_s=250)


def check_accumulation_recompute_and_groups() -> None:
    sizes = [7, 3, 0, 5]
    layouts: list[dict[str, Any]] = [
        {"kind": "ep", "group_size": 2},
        {"kind": "fssdp", "group_size": 2, "fssdp": {"replan": "always", "rematerialise": True}},
        {"kind": "fssdp", "fssdp": {"replan": "always", "reshard_every_steps": 3}},
    ]
    check_layouts(sizes, layouts, micro=2, checkpointed=True)
    check_layouts(sizes, layouts[:2], router="sigmoid_topk")


ROUTERS: list[str | RouterConfig] = [
    "sigmoid_topk",
    "expert_choice",
    "hash",
    "relu",
    DenseToSparse(kind="dense_to_sparse", until=0.5),  # all experts at first, top_k from the middle on
]


def check_routers_shapes_and_settings() -> None:
    """One rank has no tokens, or experts overflow; replicas, owners and chunks change."""
    layouts: list[dict[str, Any]] = [
        {"kind": "ep", "shard": "full", "fssdp": {"pipeline": 2}},
        {"kind": "fssdp", "every_step": move_everything, "fssdp": {**FIXED, "rematerialise": True}},
    ]
    for router in ROUTERS:
        check_layouts([0, 7], layouts, router=router, checkpointed=True)
    biased: dict[str, Any] = {"activation": "gelu", "bias": True, "shared_experts": 1, "aux_loss": 0.1}
    check_layouts([8, 5], layouts, hidden=(12, 8, 12), micro=2, capacity_factor=0.8, overflow="pad", **biased)
    check_layouts([8, 5], layouts, capacity_factor=0.8, aux_scope="sequence", **biased)


@pytest.mark.slow
def test_every_router_and_layers_of_several_shapes_train_as_in_one_process() -> None:
    run_distributed(check_routers_shapes_and_settings, 2, timeout_s=250)


class Collectives(TorchDispatchMode):
    """Writes down every collective, with its group."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            objects = [each for each in args if isinstance(each, torch.ScriptObject)]
            group = next(each for each in objects if str(each._type()).endswith("c10d.ProcessGroup"))
            self.seen.append((str(func), ProcessGroup.unbox(group).group_name))
        return func(*args, **(kwargs or {}))


def check_that_ranks_call_alike() -> None:
    """On a GPU, two groups' collectives in different orders on two ranks can wait for each other for ever."""
    for layout in LAYOUTS[0], LAYOUTS[2], LAYOUTS[5], LAYOUTS[6]:
        with Collectives() as mode:
            train_spread([9, 0], **layout, micro=2, checkpointed=True, hidden=(12, 8, 12))
        every: list[Any] = [None, None]
        dist.all_gather_object(every, mode.seen)
        assert every[0] == every[1]
        assert len({group for _, group in mode.seen}) >= 3


@pytest.mark.slow
def test_groups_smaller_than_the_world_accumulation_and_recomputation_change_nothing() -> None:
    run_distributed(check_accumulation_recompute_and_groups, 4, timeout_s=250)


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
    check_that_ranks_call_alike()
    check_bad_input()
    check_that_differing_plans_stop_all_ranks()


def test_wrong_meshes_models_and_plans_are_refused() -> None:
    run_distributed(check_faults, 2, timeout_s=250)

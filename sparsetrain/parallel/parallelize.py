"""Parallelism for any module that holds MoELayers, applied from outside."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.errors import ShardingError
from sparsetrain.moe import Experts, MoELayer, moe_layers
from sparsetrain.moe.placement import own_evenly
from sparsetrain.parallel.fssdp.experts import ShardedExperts
from sparsetrain.parallel.fssdp.groups import ExpertGroups
from sparsetrain.parallel.fssdp.rows import require_an_expert_each
from sparsetrain.parallel.fssdp.runtime import Runtime
from sparsetrain.parallel.fssdp.store import ExpertStore, store_parameters

ExpertParallelism = Literal["ep", "fssdp"]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    experts: ExpertParallelism | None,
    shard: Literal["ddp", "full"] | None = "ddp",
    layers: Iterable[nn.Module] = (),
    options: FssdpConfig | None = None,
) -> nn.Module:
    """Spread a model's experts over ranks, and replicate or shard the rest; gradients come out averaged over all ranks.

    Collective over the mesh. Build the optimizer afterwards, on the parameters of what is returned. With shard="full",
    `store_parameters(model)` are plain tensors beside sharded ones: give them a parameter group of their own to an
    optimizer that is fused or foreach, which refuse to mix the two.

    Gradients of experts come into being by `backward` alone, which leaves them in `.grad`, added to what is there.
    `torch.autograd.grad` does that, too, instead of returning them: it is no way to look at them without a trace.

    Args:
        model: On its device; where ranks differ, the first rank's weights count (for shard="full" they must agree).
        mesh: Of one dimension: its ranks share the experts. Of two, [replicate, experts]: those of each row do, and the
            rows are copies. None: all ranks share them.
        experts: ep: each expert on its owner alone. fssdp: replicas of hot experts besides, and owners that change.
            None: experts are treated as any other weight.
        shard: What becomes of the rest: ddp replicates it, full shards it (`fully_shard`); None leaves it alone, for
            a wrapper of your own, which must ignore `store_parameters(model)`.
        layers: Submodules that shard="full" gathers and frees one at a time; default: the whole at once.
        options: Of fssdp, and for ep those of the exchange; default `FssdpConfig()`.

    Returns:
        The module to call.

    Raises:
        ShardingError: The mesh does not fit, or the model has no MoELayers, or has been parallelized before; `experts`
            or `shard` is none of those.
        PlacementError: An expert group has more ranks than a layer has experts.
    """
    if shard not in ("ddp", "full", None):
        raise ShardingError(f"shard={shard!r}: expected ddp, full or None")
    mesh = mesh or init_device_mesh(_device_of(model).type, (dist.get_world_size(),))
    if shard == "ddp" and mesh.size() < dist.get_world_size():  # before anything is replaced
        raise ShardingError("a mesh of some of the ranks: pass shard=None and wrap the model yourself")
    if shard == "full" and mesh.ndim > 1 and not mesh.mesh_dim_names:
        raise ShardingError('shard="full" needs names on a mesh: mesh_dim_names=("replicate", "experts")')
    if experts is not None:
        parallelize_experts(model, ExpertGroups.of_mesh(mesh), experts, options or FssdpConfig())
    if shard == "full":
        shard_fully(model, layers, mesh)
    return replicate(model) if shard == "ddp" and mesh.size() > 1 else model


def parallelize_experts(
    model: nn.Module, groups: ExpertGroups, kind: ExpertParallelism, options: FssdpConfig
) -> list[Runtime]:
    """Replace the experts of every MoELayer by ones spread over ranks; nothing else changes.

    The owned experts of all layers that are alike in shape, dtype and what of them is trained become the rows of one
    `ExpertStore`, a submodule of the first of these layers' experts (not of the model, which may be an nn.Sequential
    and would run it). Frozen weights stay frozen, and those on the meta device stay there, to be materialised and
    initialised through their shards.

    Raises:
        ShardingError: The model has no MoELayers, or has been parallelized before.
        PlacementError: An expert group has more ranks than a layer has experts.
    """
    layers = moe_layers(model)
    if kind not in get_args(ExpertParallelism):
        raise ShardingError(f"experts={kind!r}: expected ep, fssdp or None")
    if not layers:
        raise ShardingError(f'experts="{kind}": {type(model).__name__} holds no MoELayer; pass experts=None')
    alike = _alike(layers, kind)
    for (_, _, experts), *_ in alike:  # before anything is replaced: a model that is refused stays as it was
        require_an_expert_each(experts.num_experts, groups.size)
    runtimes = []
    for members in alike:
        paths = [f"{path}.experts" if path else "experts" for path, _, _ in members]
        first = members[0][2]
        store = ExpertStore(
            first.spec, paths, first.num_experts, own_evenly(len(members), first.num_experts, groups.size), groups,
            device=first.w_in.device, dtype=first.w_in.dtype,
        )  # fmt: skip
        for name, parameter in first.named_parameters():
            store.stack(name).requires_grad_(parameter.requires_grad)
        runtime = Runtime(store, options, replicates=kind == "fssdp")
        for at, (_, layer, experts) in enumerate(members):
            store.adopt(at, experts)
            layer.experts = ShardedExperts(runtime, at)
        members[0][1].experts.add_module("store", store)
        model.register_forward_pre_hook(lambda *_, runtime=runtime: runtime.begin_forward())
        runtimes.append(runtime)
    return runtimes


def shard_fully(model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Apply `fully_shard` to submodules and to the rest of a model; its expert stores are left alone."""
    ignored = set(store_parameters(model).values())
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def replicate(model: nn.Module) -> nn.Module:
    """Wrap a model in DDP over all ranks; its expert stores are left alone, and a model that trains nothing else is."""
    stores = store_parameters(model)
    if not any(parameter.requires_grad for name, parameter in model.named_parameters() if name not in stores):
        return model
    if stores:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(stores))  # type: ignore[no-untyped-call]
    # Gradients as views of the buckets: no copy before and after the all-reduce.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, process_group=dist.group.WORLD)


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Switch the averaging of expert gradients over expert groups on or off, as DDP's `no_sync` does for the rest.

    Off for all micro-batches of a step but the last.
    """
    for module in model.modules():
        if isinstance(module, ExpertStore):
            module.requires_gradient_sync = on


Member = tuple[str, MoELayer, Experts]
"""A layer with its path and its experts."""


def _alike(layers: list[tuple[str, MoELayer]], kind: str) -> list[list[Member]]:
    """Layers whose experts can share a store: of one shape and dtype, the same of their weights trained."""
    alike: dict[object, list[Member]] = defaultdict(list)
    for path, layer in layers:
        experts = layer.experts
        if not isinstance(experts, Experts):
            raise ShardingError(f'experts="{kind}": the experts of {path or "the layer"} are spread over ranks already')
        trained = tuple(parameter.requires_grad for parameter in experts.parameters())
        alike[experts.spec, experts.num_experts, experts.w_in.dtype, trained].append((path, layer, experts))
    return list(alike.values())


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""Every layout describes the same weights: shards add up to the whole, and norms are those of one process."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.sharding import FlatPartition, WeightShard, clip_grads_, global_grad_norm, weight_shards
from sparsetrain.testing import assert_close, run_distributed


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3, bias=False))  # 3 rows: a rank of 4 holds none


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    optimizer.zero_grad()
    model(torch.randn(6, 7)).square().sum().backward()


def assembled(shard: WeightShard, local: Tensor) -> Tensor:
    """The whole tensor, by scattering each rank's part to its global indices and adding up over the group."""
    whole = torch.zeros(shard.global_numel, dtype=local.dtype)
    whole[shard.global_indices().reshape(-1)] = local.reshape(-1)
    if shard.group is not None:
        dist.all_reduce(whole, group=shard.group)
    return whole.view(shard.global_shape)


def check_against_one_process(shards: list[WeightShard], step: Callable[[], object]) -> None:
    oracle = build()
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.1)
    train_step(oracle, optimizer)
    norm = nn.utils.clip_grad_norm_(oracle.parameters(), 0.25)
    assert_close(global_grad_norm(shards), norm)
    clip_grads_(shards, 0.25, global_grad_norm(shards))
    optimizer.step()
    names = dict(oracle.named_parameters())
    for shard in shards:
        assert shard.local_shape == tuple(shard.local_weight().shape)
        grad = shard.local_grad()
        grad = torch.zeros(shard.local_shape) if grad is None else grad
        assert_close(assembled(shard, grad), names[shard.name].grad)
    step()
    for shard in shards:
        parameter = names[shard.name]
        assert shard.global_shape == tuple(parameter.shape)
        assert_close(assembled(shard, shard.local_weight()), parameter)
        assert_close(assembled(shard, shard.local_master()), parameter)
        moments = shard.local_moments()
        for key in ("exp_avg", "exp_avg_sq"):
            local = moments.get(key, torch.zeros(shard.local_shape))
            assert_close(assembled(shard, local), optimizer.state[parameter][key])


def ddp() -> None:
    model = DistributedDataParallel(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_step(model, optimizer)
    shards = weight_shards(model, optimizer)
    assert [s.replica_rank for s in shards] == [dist.get_rank()] * 3
    check_against_one_process(shards, optimizer.step)


def fully_sharded(replicas: int) -> None:
    model = build()
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_step(model, optimizer)
    shards = weight_shards(model, optimizer)
    expected = dist.get_rank() // (world_size // replicas)
    assert [s.replica_rank for s in shards] == [expected] * 3
    check_against_one_process(shards, optimizer.step)


def flat() -> None:
    """ZeRO by hand: a flat buffer cut over ranks, AdamW on this rank's piece."""
    model = build()
    train_step(model, torch.optim.SGD(model.parameters()))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    piece = nn.Parameter(cut(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), rank, world_size))
    piece.grad = cut(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), rank, world_size)
    optimizer = torch.optim.AdamW([piece], lr=0.1)
    partition = FlatPartition(
        shapes,
        dist.group.WORLD,
        weight=piece.detach,
        grad=lambda: piece.grad,
        moments=lambda: {k: v for k, v in optimizer.state[piece].items() if v.dim()},
    )
    check_against_one_process(list(partition.shards()), optimizer.step)


def cut(whole: Tensor, rank: int, world_size: int) -> Tensor:
    padded = nn.functional.pad(whole, (0, -whole.numel() % world_size))
    return padded.chunk(world_size)[rank].clone()


def all_layouts() -> None:
    ddp()
    fully_sharded(replicas=1)
    flat()
    if dist.get_world_size() == 4:
        fully_sharded(replicas=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_agrees_with_one_process(world_size: int) -> None:
    assert run_distributed(all_layouts, world_size, timeout_s=250) == [None] * world_size

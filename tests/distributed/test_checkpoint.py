"""A checkpoint saved at any layout loads at any other, bit for bit; what fails on one rank, all ranks say."""

import hashlib
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_state,
    load_weights,
    optimizer_state,
    read_state,
    save_checkpoint,
)
from sparsetrain.errors import CheckpointError
from sparsetrain.sharding import FlatPartition, WeightShard, weight_shards
from sparsetrain.testing import run_distributed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("checkpoint")]

MASKED = ("0.weight", "2.weight", "2.bias")
Model = tuple[list[WeightShard], torch.optim.Optimizer]


def build() -> nn.Module:
    # 5 and 3 rows over 4 ranks: uneven, and a rank without any. 12 and 5 columns: bytes that end inside a row.
    return nn.Sequential(nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))


def whole(name: str, what: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that every layout holds its part of: a function of its name alone."""
    seed = int.from_bytes(hashlib.blake2b(f"{name}/{what}".encode(), digest_size=4).digest(), "little")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ddp() -> Model:
    model = build()
    module = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return weight_shards(module, optimizer), optimizer


def fully_sharded(replicas: int = 1, by_columns: bool = False) -> Model:
    model = build()
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("copy", "part"))
    fully_shard(
        model,
        mesh=mesh if replicas > 1 else mesh["part"],
        shard_placement_fn=lambda parameter: Shard(int(by_columns and parameter.shape[-1] == 12)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return weight_shards(model, optimizer), optimizer


def flat() -> Model:
    shapes = {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    piece = nn.Parameter(torch.zeros(-(-total // dist.get_world_size())))
    optimizer = torch.optim.AdamW([piece], lr=0.1)

    def moments() -> dict[str, Tensor]:
        return {key: value for key, value in optimizer.state[piece].items() if value.dim()}

    partition = FlatPartition(shapes, dist.group.WORLD, weight=piece.detach, grad=lambda: None, moments=moments)
    return list(partition.shards()), optimizer


@dataclass(frozen=True)
class Layout:
    build: Callable[[], Model]
    world_sizes: tuple[int, ...]


def columns() -> Model:
    return fully_sharded(by_columns=True)


def hybrid() -> Model:
    return fully_sharded(replicas=2)


LAYOUTS = {
    "ddp": Layout(ddp, (1, 2, 4)),
    "full": Layout(fully_sharded, (2, 4)),
    "columns": Layout(columns, (2, 4)),
    "hybrid": Layout(hybrid, (4,)),
    "flat": Layout(flat, (2, 4)),
}


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def layouts() -> dict[str, Layout]:
    return {name: layout for name, layout in LAYOUTS.items() if world_size() in layout.world_sizes}


def save_all(root: Path) -> None:
    """Save at every layout of this number of ranks what `whole` says."""
    for name, layout in layouts().items():
        shards, optimizer = layout.build()
        steps = {"settings": {"lr": 0.5}, "steps": 7.0}
        load_optimizer_state(optimizer, {"groups": [steps]})
        for shard in shards:
            fill(shard)
        masks = {
            shard.name: shard.cut(whole(shard.name, "mask", shard.global_shape) < 0.5)
            for shard in shards
            if shard.name in MASKED
        }
        torch.manual_seed(rank())
        state = {"optimizer": optimizer_state(optimizer), "by": name}
        save_checkpoint(root / f"{name}-{world_size()}", 3, shards=shards, masks=masks, state=state, keep=1)


def parts(shard: WeightShard) -> dict[str, Tensor]:
    return {"weight": shard.local_weight(), **shard.local_moments()}


def fill(shard: WeightShard) -> None:
    assert set(parts(shard)) == {"weight", "exp_avg", "exp_avg_sq"}
    for what, local in parts(shard).items():
        local.copy_(shard.cut(whole(shard.name, what, shard.global_shape)))


def load_everything(root: Path) -> None:
    """Load all that has been saved so far at every layout of this number of ranks."""
    for folder in sorted(root.iterdir()):
        for name, layout in layouts().items():
            shards, optimizer = layout.build()
            check_load(folder, shards, optimizer, f"{folder.name} at {name}-{world_size()}")
        weights, _ = ddp()
        load_weights(folder, weights)
        assert all(torch.equal(s.local_weight(), whole(s.name, "weight", s.global_shape)) for s in weights)


def check_load(folder: Path, shards: list[WeightShard], optimizer: torch.optim.Optimizer, case: str) -> None:
    path = latest_checkpoint(folder)
    assert path is not None
    saved = read_state(path)
    assert saved["by"] == folder.name.rsplit("-", 1)[0]
    load_optimizer_state(optimizer, saved["optimizer"])
    checkpoint = load_checkpoint(path, shards=shards)
    assert {state["step"].item() for state in optimizer.state.values()} == {7.0}, case
    for shard in shards:
        for what, local in parts(shard).items():
            assert torch.equal(local, shard.cut(whole(shard.name, what, shard.global_shape))), (case, shard.name, what)
    for shard in shards:
        if shard.name in MASKED:
            expected = shard.cut(whole(shard.name, "mask", shard.global_shape) < 0.5)
            assert torch.equal(checkpoint.masks[shard.name], expected), (case, shard.name)
    assert set(checkpoint.masks) == set(MASKED)


def failures(root: Path) -> list[str]:
    """What each attempt says, on this rank."""
    shards, _ = ddp()
    say: list[str] = []

    def attempt(work: Callable[[], object]) -> None:
        with pytest.raises(CheckpointError) as error:
            work()
        say.append(str(error.value))

    def save(step: int) -> Path:
        return save_checkpoint(root, step, shards=shards, masks={}, state={}, keep=5)

    intact = save(1)
    attempt(lambda: on_a_full_disk(lambda: save(2)))
    dist.barrier()  # rank 0 has cleared up
    assert list_checkpoints(root) == [intact] == list(root.iterdir())
    newest = save(3)
    dist.barrier()
    if rank() == 1:
        os.truncate(newest / "__1_0.distcp", 100)
    dist.barrier()
    attempt(lambda: load_checkpoint(newest, shards=shards))
    notices: list[str] = []
    assert latest_checkpoint(root, on_damaged=notices.append) == intact
    assert len(notices) == (1 if rank() == 0 else 0)
    shards.pop() if rank() == 1 else None
    with pytest.raises(RuntimeError, match=r"rank 1 on"):
        save_checkpoint(root, 4, shards=shards, masks={"2.bias": torch.ones(3) > 0}, state={}, keep=5)
    return say


def on_a_full_disk(work: Callable[[], object]) -> None:
    """Rank 1's disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def draws(root: Path, *, first: bool) -> float:
    """One random number after a save by two ranks or a load by any."""
    shards, _ = ddp()
    torch.manual_seed(rank())
    if first:
        save_checkpoint(root, 1, shards=shards, masks={}, state={}, keep=1)
    else:
        load_checkpoint(root / "step-00000001", shards=shards)
    return torch.rand(()).item()


@dataclass(frozen=True)
class Rank:
    """What one rank has to say."""

    failures: list[str]
    draws: list[float]


def two_ranks(root: Path) -> Rank:
    load_everything(root / "layouts")
    save_all(root / "layouts")
    return Rank(failures(root / "failing"), [draws(root / "random", first=True)])


def four_ranks(root: Path) -> Rank:
    load_everything(root / "layouts")
    save_all(root / "layouts")
    return Rank([], [draws(root / "random", first=False) for _ in range(2)])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(root) -> dict[int, list[Rank]]:
    """Save at 1 rank, load and save at 2, load and save at 4: each loads all that was saved before it."""
    save_all(root / "layouts")
    return {
        2: run_distributed(two_ranks, 2, root, timeout_s=280),
        4: run_distributed(four_ranks, 4, root, timeout_s=280),
    }


def test_any_layout_and_number_of_ranks_loads_at_any_other(root, ranks):
    assert len(list((root / "layouts").iterdir())) == 1 + 4 + 5
    load_everything(root / "layouts")


def test_a_failure_of_one_rank_is_everyones(ranks):
    first, second = ranks[2]
    assert first.failures == second.failures
    full, cut_short = first.failures
    assert "File too large" in full
    assert full.endswith("(rank 1)")
    assert "__1_0.distcp: damaged: 100 bytes instead of" in cut_short


def test_random_numbers_go_on_and_are_derived_for_new_ranks(ranks):
    saved = [rank.draws[0] for rank in ranks[2]]
    loaded = [rank.draws[0] for rank in ranks[4]]
    assert loaded[:2] == saved
    assert [rank.draws[1] for rank in ranks[4]] == loaded
    assert len(set(loaded)) == 4

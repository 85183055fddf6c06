"""Experts change owners with everything that is kept for them, bit for bit; checkpoints know no owners at all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import init_device_mesh

from sparsetrain.checkpoint import load_checkpoint, load_optimizer_state, optimizer_state, read_state, save_checkpoint
from sparsetrain.config import SparsityRule
from sparsetrain.errors import PlacementError, ShardingError
from sparsetrain.moe import Experts, ExpertSpec
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp import ExpertGroups, ExpertStore, Traffic
from sparsetrain.sharding import Move, WeightShard, global_grad_norm, on_move, weight_shards
from sparsetrain.sparsity import Sparsifier
from sparsetrain.testing import assert_close, run_distributed
from tests.distributed.stored_experts import (
    NUM_EXPERTS,
    SPECS,
    compute,
    expected_gradient,
    model_of,
    plans,
    run_backward,
    single_process,
    stored,
    stored_layers,
)

SPEC = ExpertSpec(dim=6, ffn_dim=4)
RULE = SparsityRule(
    params="*.experts.*",
    method="prune",
    sparsity=0.6,
    distribution="global",
    schedule={"kind": "geometric", "every_steps": 2, "start": 0.2, "end": 0.9},
)
STEPS = 6


@dataclass
class Trained:
    """A model in training, whose experts move or stay."""

    store: ExpertStore | None
    experts: list[Experts]
    world_size: int

    def __post_init__(self) -> None:
        self.model = model_of(self.experts if self.store is None else stored_layers(self.store))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=0.1)
        self.sparsifier = Sparsifier([RULE], total_steps=STEPS).attach(self.model, self.optimizer)
        self.norms: list[Tensor] = []

    def shards(self) -> list[WeightShard]:
        return weight_shards(self.model, self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        step = len(self.norms)
        if self.store is None:
            gradients = expected_gradient(self.experts, [step], self.world_size)
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
        else:
            run_backward(partial(compute, self.store, plans(self.store, step), step, torch.float32))
        self.sparsifier.mask_gradients()
        self.norms.append(global_grad_norm(self.shards()))
        self.optimizer.step()

    def kept(self) -> dict[str, Tensor]:
        """Everything that this rank keeps of the weights it holds: weight, gradient, moments and mask, by name."""
        found: dict[str, Tensor] = {}
        masks = self.sparsifier.masks()
        for shard in self.shards():
            if shard.local_numel:
                grad = shard.local_grad()
                of_weight = {"weight": shard.local_weight(), "mask": masks.get(shard.name), "grad": grad}
                of_weight |= shard.local_moments()
                found |= {f"{shard.name} {key}": value.clone() for key, value in of_weight.items() if value is not None}
        return found


def in_training(groups: ExpertGroups, spec: ExpertSpec = SPEC) -> Trained:
    experts = single_process(spec)
    return Trained(stored(spec, groups, experts), experts, groups.world_size)


def gathered(kept: dict[str, Tensor], groups: ExpertGroups) -> dict[str, Tensor]:
    """What all ranks of the expert group keep; nothing twice."""
    by_rank: list[dict[str, Tensor]] = [{}] * groups.size
    dist.all_gather_object(by_rank, kept, group=groups.experts)
    together = {name: value for of_rank in by_rank for name, value in of_rank.items()}
    assert len(together) == sum(map(len, by_rank))
    return together


def shuffled(owners_LE: IntArray, seed: int) -> IntArray:
    """Other owners of which each has as many experts as before."""
    return np.random.default_rng(seed).permutation(owners_LE.ravel()).reshape(owners_LE.shape)


def check_state_moves_bitwise(groups: ExpertGroups, spec: ExpertSpec) -> None:
    """Invariant 6, over several moves, with gradients in place and after they are gone; only what moves travels."""
    trained = in_training(groups, spec)
    store = trained.store
    tensors = dict(store.named_parameters())
    for seed, keeps_gradients in enumerate((True, False, True)):
        trained.step()
        if not keeps_gradients:
            trained.optimizer.zero_grad()
        before = gathered(trained.kept(), groups)
        old_LE, new_LE = store.owners_LE, shuffled(store.owners_LE, seed)
        store.traffic = Traffic()
        store.reshard(new_LE, trained.optimizer)
        assert np.array_equal(store.owners_LE, new_LE)
        after = gathered(trained.kept(), groups)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        arrived = int(((new_LE == groups.rank) & (old_LE != groups.rank)).sum())
        masked = sum(shape.numel() for name, shape in shapes(spec).items() if not name.endswith("bias"))
        assert store.traffic.moved == arrived * (spec.numel * 4 * (4 if keeps_gradients else 3) + masked)
    assert all(tensors[name] is parameter for name, parameter in store.named_parameters())
    same = store.reshard(store.owners_LE.copy(), trained.optimizer)
    assert (list(same.shards), same.carry({})) == ([], {})


def shapes(spec: ExpertSpec) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in spec.weight_shapes().items()}


def check_training_goes_on(groups: ExpertGroups) -> None:
    """Norms, masks and weights of a run that moves its experts every other step are those of one process."""
    moving = in_training(groups)
    still = Trained(None, single_process(SPEC), groups.world_size)
    for step in range(STEPS):
        moving.step()
        still.step()
        if step % 2:
            moving.store.reshard(shuffled(moving.store.owners_LE, step), moving.optimizer)
    assert_close(torch.stack(moving.norms), torch.stack(still.norms))
    assert moving.sparsifier.nonzeros == still.sparsifier.nonzeros < 0.5 * still.sparsifier.numel
    masks, expected_masks = moving.sparsifier.masks(), still.sparsifier.masks()
    for shard, expected in zip(moving.shards(), still.shards(), strict=True):
        assert torch.equal(masks[shard.name], shard.cut(expected_masks[shard.name])), shard.name
        assert_close(shard.local_weight(), shard.cut(expected.local_weight()))
        assert (shard.local_weight()[~masks[shard.name]] == 0).all()


def check_anything_can_be_carried(groups: ExpertGroups) -> None:
    """Listeners carry what they keep for a weight, of any type, and hear of every move until they stop listening."""
    trained = in_training(groups)
    store = trained.store
    moves: list[Move] = []
    handles = on_move(trained.model, moves.append)
    before = {shard.name: shard.local_weight().clone() for shard in trained.shards()}
    stale = trained.shards()
    move = store.reshard(shuffled(store.owners_LE, 3), trained.optimizer)
    assert moves == [move]
    moved = {shard.name: shard for shard in move.shards}
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, lambda weight: (weight * 1000).long(), lambda w: w > 0):
        carried = move.carry({name: change(before[name]) for name in moved})
        for name, shard in moved.items():
            assert torch.equal(carried[name], change(shard.local_weight())), name
            assert carried[name].shape == shard.local_shape
    unmoved = next(name for name in before if name not in moved)
    with pytest.raises(KeyError, match=f"{unmoved} has not moved"):
        move.carry({unmoved: before[unmoved]})
    for shard in stale:
        here_then, here_now = shard.local_shape, moved.get(shard.name, shard).local_shape
        if here_then != here_now:
            with pytest.raises(ShardingError, match="has changed owners since its shards were taken"):
                shard.local_weight()
    for handle in handles:
        handle.remove()
    store.reshard(shuffled(store.owners_LE, 4), trained.optimizer)
    assert moves == [move]


def check_bad_moves_are_refused(groups: ExpertGroups) -> None:
    """Every rank says so, and nothing has moved."""
    trained = in_training(groups)
    trained.step()
    store, optimizer, before = trained.store, trained.optimizer, trained.kept()
    last = groups.world_size - 1  # the only one to differ
    is_last = dist.get_rank() == last
    own_idea = shuffled(store.owners_LE, 5) if is_last else store.owners_LE
    refused = [
        (np.zeros_like(store.owners_LE), optimizer, r"rank 0 of the expert group owns \d experts and would own 15"),
        (store.owners_LE[:2], optimizer, r"owners of shape \(2, 5\)"),
        (
            own_idea,
            optimizer,
            rf"ranks 0 and {last} were given different owners for layers\.0\.moe\.experts: \[.* and \[",
        ),
        (store.owners_LE, None if is_last else optimizer, rf"ranks 0 and {last} keep different tensors .*exp_avg"),
    ]
    for owners_LE, of_optimizer, said in refused:
        with pytest.raises(PlacementError, match=said):
            store.reshard(owners_LE, of_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in trained.kept().items())


def check_everything() -> None:
    world_size = dist.get_world_size()
    layouts = [ExpertGroups.of_mesh(init_device_mesh("cpu", (world_size,)))]
    if world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "experts"))
        layouts.append(ExpertGroups.of_mesh(mesh))
    for groups in layouts:
        for spec in SPECS:
            check_state_moves_bitwise(groups, spec)
        check_training_goes_on(groups)
        check_anything_can_be_carried(groups)
        check_bad_moves_are_refused(groups)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_everything_kept_for_an_expert_moves_with_it(world_size: int) -> None:
    run_distributed(check_everything, world_size, timeout_s=250)


def stored_for(mesh_shape: tuple[int, ...], resharded: bool = False) -> Trained:
    trained = in_training(ExpertGroups.of_mesh(init_device_mesh("cpu", mesh_shape)))
    if resharded:
        trained.store.reshard(shuffled(trained.store.owners_LE, 11), trained.optimizer)
    return trained


def save_at_two_ranks(folder: Path) -> dict[str, Tensor]:
    """Save a trained and resharded model; returns everything in it."""
    trained = stored_for((2,), resharded=True)
    trained.step()
    trained.step()
    trained.optimizer.zero_grad()
    save_checkpoint(
        folder,
        2,
        shards=trained.shards(),
        masks=trained.sparsifier.masks(),
        state={"optimizer": optimizer_state(trained.optimizer)},
        keep=1,
    )
    return gathered(trained.kept(), trained.store.groups)


def check_loaded(trained: Trained, folder: Path, expected: dict[str, Tensor]) -> None:
    """Every weight, moment and mask that is here is bitwise what was saved, whatever was here before."""
    trained.step()
    trained.optimizer.zero_grad()
    load_optimizer_state(trained.optimizer, read_state(folder / "step-00000002")["optimizer"])
    checkpoint = load_checkpoint(folder / "step-00000002", shards=trained.shards())
    trained.sparsifier.load_masks(checkpoint.masks)
    kept = trained.kept()
    assert kept.keys() <= expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in kept.items())
    if trained.store is None:
        assert kept.keys() == expected.keys()
    else:
        assert gathered(kept, trained.store.groups).keys() == expected.keys()


def load_in_every_layout(folder: Path, expected: dict[str, Tensor]) -> None:
    layouts: list[Callable[[], Trained]] = [
        partial(stored_for, (4,)),
        partial(stored_for, (4,), resharded=True),
        partial(stored_for, (2, 2), resharded=True),
        partial(stored_for, (4, 1)),  # every rank alone owns all experts
    ]
    for build in layouts:
        check_loaded(build(), folder, expected)


@pytest.mark.slow
def test_a_checkpoint_loads_at_any_number_of_ranks_and_owners(tmp_path: Path) -> None:
    expected, _ = run_distributed(save_at_two_ranks, 2, tmp_path)
    assert len(expected) == 3 * NUM_EXPERTS * 3 * 4  # layers, experts, matrices; weight, mask and two moments
    run_distributed(load_in_every_layout, 4, tmp_path, expected)
    check_loaded(Trained(None, single_process(SPEC, seed=1), 1), tmp_path, expected)

"""An expert store trains as `Experts` on one device do: gradients, norms, masks and Adam's state."""

import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import SparsityRule
from sparsetrain.errors import PlacementError
from sparsetrain.moe import Experts, ExpertSpec
from sparsetrain.moe.placement import ExpertBytes, materialised_bytes, owned_bytes
from sparsetrain.parallel.fssdp import ExpertGroups, ExpertStore, store_parameters
from sparsetrain.sharding import clip_grads_, global_grad_norm, weight_shapes, weight_shards
from sparsetrain.sparsity import Sparsifier, describe_parameters
from sparsetrain.testing import assert_close, run_distributed
from tests.distributed.stored_experts import (
    PATHS,
    SPECS,
    Backward,
    StoredExperts,
    Work,
    compute,
    expected_gradient,
    model_of,
    plans,
    run_backward,
    single_process,
    stored,
    stored_layers,
)

RULES = [
    SparsityRule(
        params="*.experts.*",
        method="prune",
        sparsity=0.6,
        distribution=distribution,
        schedule={"kind": "geometric", "every_steps": 2, "start": 0.2, "end": 0.9},
    )
    for distribution in ("uniform", "global")
]


def check_gradients(store: ExpertStore, experts: Sequence[Experts], batches: Sequence[int]) -> None:
    model, oracle = (weight_shards(model_of(each)) for each in (stored_layers(store), experts))
    parameters = [parameter for each in experts for parameter in each.parameters()]
    expected = expected_gradient(experts, batches, store.groups.world_size)
    for parameter, gradient in zip(parameters, expected, strict=True):
        parameter.grad = gradient
    for shard, wanted in zip(model, oracle, strict=True):
        assert shard.name == wanted.name
        if shard.local_numel:
            assert torch.equal(shard.local_grad(), wanted.local_grad()), shard.name


def check_accumulation(groups: ExpertGroups, spec: ExpertSpec, dtype: torch.dtype) -> None:
    """`.grad` is the mean over all ranks of the sum over micro-batches, however they are synchronised."""
    experts = single_process(spec)
    store = stored(spec, groups, experts)
    optimizer = torch.optim.SGD(store.parameters(), lr=0.1)
    for number, syncs in enumerate([(True,), (False, False, True), (True, True), (True, False, True)]):
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        for batch, store.requires_gradient_sync in enumerate(syncs):
            run_backward(partial(compute, store, plans(store, 10 * number + batch if batch else None), batch, dtype))
        check_gradients(store, experts, range(len(syncs)))
    # A layer that is called twice in one pass has the sum of both, also when nobody says that it is done again.
    optimizer.zero_grad()
    calls = [partial(compute, store, plans(store, seed), seed, dtype) for seed in (2, 3)]
    run_backward(lambda: [call() for call in [*calls, partial(store.gradients, 2, None)]])
    check_gradients(store, experts, [2, 3])
    # What was accumulated without synchronisation goes with zero_grad, as DDP's no_sync would have it.
    store.requires_gradient_sync = False
    run_backward(partial(compute, store, plans(store, 5), 7, dtype))
    optimizer.zero_grad()
    store.requires_gradient_sync = True
    run_backward(partial(compute, store, plans(store, 6), 8, dtype))
    check_gradients(store, experts, [8])


def trained(model: nn.Module, rule: SparsityRule, backward: Callable[[int], None]):
    """Clipped and masked steps of AdamW; what of the weights is here, with its norms and masks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    sparsifier = Sparsifier([rule], total_steps=6).attach(model, optimizer)
    shards, norms = weight_shards(model, optimizer), []
    for step in range(6):
        optimizer.zero_grad()
        backward(step)
        sparsifier.mask_gradients()
        norms.append(global_grad_norm(shards))
        clip_grads_(shards, 1.0, norms[-1])
        optimizer.step()
    return shards, torch.stack(norms), sparsifier


def check_training(groups: ExpertGroups, spec: ExpertSpec, rule: SparsityRule) -> None:
    """Norms, masks, weights and Adam's state of a masked training equal those of one process."""
    experts = single_process(spec)
    store = stored(spec, groups, experts)

    def backward(step: int) -> None:
        run_backward(partial(compute, store, plans(store, step), step, torch.float32))

    def on_one_device(step: int) -> None:
        gradients = expected_gradient(experts, [step], groups.world_size)
        for parameter, gradient in zip(model_of(experts).parameters(), gradients, strict=True):
            parameter.grad = gradient

    shards, norms, sparsifier = trained(model_of(stored_layers(store)), rule, backward)
    oracle, expected_norms, expected = trained(model_of(experts), rule, on_one_device)
    assert_close(norms, expected_norms)
    assert sparsifier.nonzeros == expected.nonzeros < 0.5 * sparsifier.numel
    masks, expected_masks = sparsifier.masks(), expected.masks()
    assert masks.keys() == expected_masks.keys()
    for shard, wanted in zip(shards, oracle, strict=True):
        assert (shard.name, shard.global_shape) == (wanted.name, wanted.global_shape)
        if shard.name in expected_masks:  # biases stay dense
            assert torch.equal(masks[shard.name], shard.cut(expected_masks[shard.name])), shard.name
        assert_close(shard.local_weight(), shard.cut(wanted.local_weight()))
        assert set(shard.local_moments()) == {"exp_avg", "exp_avg_sq"}
        for key, moment in shard.local_moments().items():
            assert_close(moment, shard.cut(wanted.local_moments()[key]))
    held = torch.tensor([shard.local_numel for shard in shards])
    dist.all_reduce(held, group=groups.parameters)
    assert held.tolist() == [shard.global_numel for shard in shards]  # invariant 1: one owner each


def check_description(groups: ExpertGroups, spec: ExpertSpec) -> None:
    """The model has the same weights as on one device, also where nothing is materialised."""
    with torch.device("meta"):
        experts = single_process(spec)
        store = stored(spec, groups, experts)
    model = model_of(stored_layers(store))
    assert store.w_in.is_meta
    assert list(weight_shapes(model).items()) == list(weight_shapes(model_of(experts)).items())
    assert describe_parameters(model) == describe_parameters(model_of(experts))
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    store.reset_parameters()
    for shard in weight_shards(model):
        if shard.local_numel:
            assert 0 < shard.local_weight().abs().max() <= 3**-0.5
    if groups.replicate is not None:
        first = store.w_in.detach().clone()
        dist.broadcast(first, group=groups.replicate, group_src=0)
        assert torch.equal(first, store.w_in)


def check_first_rank_speaks_for_all(groups: ExpertGroups) -> None:
    """Every rank built the model with another seed; what is trained is what rank 0 built."""
    store = stored(SPECS[1], groups, single_process(SPECS[1], seed=dist.get_rank()))
    expected = weight_shards(model_of(single_process(SPECS[1], seed=0)))
    for shard, wanted in zip(weight_shards(model_of(stored_layers(store))), expected, strict=True):
        assert torch.equal(shard.local_weight(), shard.cut(wanted.local_weight()))


def check_memory(groups: ExpertGroups, dtype: torch.dtype) -> None:
    """Bytes of parameters, optimizer state and replicas, counted in storages, are the closed formula's."""
    spec = ExpertSpec(dim=16, ffn_dim=8)
    store = stored(spec, groups, single_process(spec))
    optimizer = torch.optim.AdamW(store.parameters())
    placements = plans(store, 3)
    run_backward(partial(compute, store, placements, 0, dtype))
    optimizer.step()
    expert = ExpertBytes(spec.numel, replica_itemsize=dtype.itemsize, gradient_itemsize=0)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert storage_bytes([*store.parameters()]) == store.parameter_bytes
    assert storage_bytes([*store.parameters(), *moments]) == owned_bytes(store.owners_LE, groups.rank, expert)
    replicas = [store.start_gather(layer, plan, dtype).wait() for layer, plan in enumerate(placements)]
    held = storage_bytes([tensor for each in replicas for tensor in each.weights("w_in") + each.weights("w_out")])
    assert held == materialised_bytes(placements, groups.rank, expert, freed=False)
    storages = [StorageWeakRef(each.weights("w_in")[0].untyped_storage()) for each in replicas if each.experts]
    for each in replicas:
        each.free()
    while not all(storage.expired() for storage in storages):  # for ever if somebody keeps them: see the time limit
        os.sched_yield()  # a thread of gloo may be about to let go of what it received
    with pytest.raises(AssertionError, match="after they were freed"):
        store.local_experts(0, replicas[0], dtype)


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def check_casts(groups: ExpertGroups) -> None:
    """Casts are made once for all micro-batches of a step, and never survive a change of the weights."""
    store = stored(SPECS[0], groups, single_process(SPECS[0]))
    expert = store.owned(0)[0]

    def cast(keep: bool = True) -> Tensor:
        return store.local_experts(0, None, torch.bfloat16, keep=keep).w_in[0]

    def parameter() -> Tensor:
        return store.w_in.detach()[store.row_of(0, expert)]

    assert store.local_experts(0, None, torch.float32).w_in[0].data_ptr() == parameter().data_ptr()
    first = cast()
    store.requires_gradient_sync = False
    run_backward(partial(compute, store, plans(store, 1), 0, torch.bfloat16))
    assert cast().data_ptr() == first.data_ptr()
    changes: list[Work] = [
        lambda: parameter().add_(1),
        torch.optim.AdamW(store.parameters(), lr=0.1, fused=True).step,
        torch.optim.AdamW(store.parameters(), lr=0.1, foreach=True).step,
    ]
    for change in changes:
        before = cast().clone()
        change()
        assert not torch.equal(cast(), before)
        assert torch.equal(cast(), parameter().bfloat16())
    store.requires_gradient_sync = True
    storage = StorageWeakRef(cast().untyped_storage())
    del first
    run_backward(store.queue_finish)
    assert storage.expired()  # an optimizer's step comes next, and needs the memory more
    cast()
    store.w_in.data.mul_(2)  # leaves no trace, which is why evaluation keeps nothing
    assert torch.equal(cast(keep=False), parameter().bfloat16())


def check_a_rank_without_tokens_takes_part(groups: ExpertGroups) -> None:
    """It has gradients for others to average with, though it computes none."""
    store = stored(SPECS[0], groups, single_process(SPECS[0]))
    idle = dist.get_rank() == 0

    def work() -> None:
        store.queue_finish()
        if not idle:
            store.gradients(0, None).w_in[0].add_(groups.world_size)

    run_backward(work)
    row = store.row_of(0, store.owned(0)[0])
    shares = groups.num_groups - (groups.rank == 0)  # how many ranks, with rank 0 idle, added to this row
    assert (store.w_in.grad[row] == shares).all()
    assert (store.w_out.grad == 0).all()


class WithRest(nn.Module):
    def __init__(self, store: ExpertStore) -> None:
        super().__init__()
        self.rest = nn.Linear(4, 4, bias=False)
        self.experts = StoredExperts(store, 0)

    def forward(self, x: Tensor) -> Tensor:
        store = self.experts.store
        return Backward.apply(self.rest(x), partial(compute, store, plans(store, 2), 0, torch.float32)).sum()


def check_wrappers_leave_experts_alone(groups: ExpertGroups) -> None:
    """DDP and fully_shard average the rest; ranks own different numbers of experts and need not notice."""
    for wrap in (wrap_in_ddp, wrap_in_fsdp):
        store = stored(SPECS[0], groups, single_process(SPECS[0]))
        model = WithRest(store)
        wrapped = wrap(model, groups)
        assert [*store_parameters(wrapped).values()] == [*store.parameters()]
        assert not any(isinstance(parameter, DTensor) for parameter in store.parameters())
        wrapped(torch.full((2, 4), float(dist.get_rank()))).backward()
        gradient = model.rest.weight.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert_close(gradient, torch.full((4, 4), float(groups.world_size - 1)))
        check_gradients(store, single_process(SPECS[0]), [0])


def wrap_in_ddp(model: nn.Module, groups: ExpertGroups) -> nn.Module:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, store_parameters(model))
    return DistributedDataParallel(model)


def wrap_in_fsdp(model: nn.Module, groups: ExpertGroups) -> nn.Module:
    mesh = init_device_mesh("cpu", (groups.world_size,))
    return fully_shard(model, mesh=mesh, ignored_params=set(store_parameters(model).values()))


def check_frozen_experts_get_no_gradient(groups: ExpertGroups) -> None:
    store = stored(SPECS[0], groups, single_process(SPECS[0]))
    store.w_in.requires_grad_(False)
    run_backward(partial(compute, store, plans(store, 4), 0, torch.float32))
    assert store.w_in.grad is None
    first = store.w_out.grad.clone()
    run_backward(partial(compute, store, plans(store, 4), 0, torch.float32))
    assert store.w_in.grad is None
    assert torch.equal(store.w_out.grad, 2 * first)


def check_bad_owners_are_refused(groups: ExpertGroups) -> None:
    for num_experts, owners, said in [
        (1, np.zeros((3, 1)), "1 experts cannot be spread over an expert group of 2 ranks: make groups of 1 ranks"),
        (5, np.zeros((2, 5)), r"owners of shape \(2, 5\): expected \(3, 5\)"),
        (5, np.full((3, 5), 2), "an owner is none of the ranks 0 to 1"),
    ]:
        with pytest.raises(PlacementError, match=said):
            ExpertStore(SPECS[0], PATHS, num_experts, owners.astype(np.int64), groups)


def check_everything() -> None:
    world_size = dist.get_world_size()
    layouts = [ExpertGroups.of_mesh(init_device_mesh("cpu", (world_size,)))]
    if world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "experts"))
        layouts.append(ExpertGroups.of_mesh(mesh))
    for groups in layouts:
        for spec, rule, dtype in zip(SPECS, RULES, (torch.float32, torch.bfloat16), strict=True):
            check_accumulation(groups, spec, dtype)
            check_training(groups, spec, rule)
            check_description(groups, spec)
            check_memory(groups, dtype)
        check_first_rank_speaks_for_all(groups)
        check_casts(groups)
        check_wrappers_leave_experts_alone(groups)
        check_frozen_experts_get_no_gradient(groups)
        check_a_rank_without_tokens_takes_part(groups)
        if groups.size == 2:
            check_bad_owners_are_refused(groups)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_store_trains_as_experts_on_one_device(world_size: int) -> None:
    run_distributed(check_everything, world_size, timeout_s=250)

"""The sparse collectives: replicas are their owners' bits, gradients come back once each, bytes are the formula's."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparsetrain.errors import ShardingError
from sparsetrain.moe import ExpertSpec
from sparsetrain.moe.placement import ExpertBytes, Placement, Topology, own_evenly, received_bytes, returned_bytes
from sparsetrain.parallel.fssdp import ExpertGroups, ExpertStore, Traffic
from sparsetrain.parallel.fssdp.collectives import Route, sparse_all_gather, sparse_reduce_scatter
from sparsetrain.testing import requires_gpu, run_distributed
from sparsetrain.testing.distributed import DistributedTestError

SPEC = ExpertSpec(dim=6, ffn_dim=4, bias=False)
NUM_LAYERS, NUM_EXPERTS = 3, 5  # no number of ranks but 1 divides 15: owners are uneven
TIMEOUT = timedelta(seconds=120)


def placements(owner_E: np.ndarray, num_ranks: int) -> dict[str, Placement]:
    """No replicas, all replicas, one expert everywhere, one rank that holds all, and chance."""
    alone = Placement.of_owners(owner_E, num_ranks)
    held = {name: alone.holders_ED.copy() for name in ("nowhere", "everywhere", "hot", "one rank", "chance")}
    held["everywhere"][:] = True
    held["hot"][3] = True
    held["one rank"][:, num_ranks - 1] = True
    held["chance"] |= np.random.default_rng(0).random(held["chance"].shape) < 0.4
    return {name: Placement(owner_E, holders) for name, holders in held.items()}


def whole_expert(layer: int, expert: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Its weights: a function of its name."""
    seed = 1000 * layer + 10 * expert + ["w_in", "w_out", "b_in", "b_out"].index(name)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled_store(groups: ExpertGroups, spec: ExpertSpec, device: str = "cpu") -> ExpertStore:
    owners_LE = np.random.default_rng(1).permuted(own_evenly(NUM_LAYERS, NUM_EXPERTS, groups.size), axis=1)
    paths = [f"layers.{layer}.moe.experts" for layer in range(NUM_LAYERS)]
    store = ExpertStore(spec, paths, NUM_EXPERTS, owners_LE, groups, device=device)
    with torch.no_grad():
        for layer in range(NUM_LAYERS):
            for expert in store.owned(layer):
                for name, shape in spec.shapes.items():
                    store.stack(name)[store.row_of(layer, expert)] = whole_expert(layer, expert, name, shape)
    return store


def check_replicas(store: ExpertStore, layer: int, placement: Placement, dtype: torch.dtype) -> None:
    """Invariant 3: every slot is bitwise the owner's weights, and exactly their bytes have come over the wire."""
    rank = store.groups.rank
    before = store.traffic.gathered
    replicas = store.start_gather(layer, placement, dtype).wait()
    local = store.local_experts(layer, replicas, dtype)
    assert local.experts == (*placement.owned_by(rank), *placement.replicas_of(rank))
    for name, shape in store.spec.shapes.items():
        for expert, tensor in zip(local.experts, getattr(local, name), strict=True):
            expected = whole_expert(layer, expert, name, shape).to(tensor.device, dtype)
            assert torch.equal(tensor, expected), (layer, expert, name)
            assert tensor.is_contiguous()
    expert_bytes = ExpertBytes(store.spec.numel, replica_itemsize=dtype.itemsize)
    assert replicas.bytes_received == received_bytes(placement, rank, expert_bytes)
    assert store.traffic.gathered - before == replicas.bytes_received


def check_gradients(store: ExpertStore, layer: int, placement: Placement, dtype: torch.dtype) -> None:
    """Invariant 4: ones come back as holder counts, and unequal numbers as their sum, each holder's once."""
    rank, size = store.groups.rank, store.groups.size
    replicas = store.start_gather(layer, placement, dtype)
    for value_of in (lambda _: 1.0, lambda holder: 3.0**holder):
        store.traffic = Traffic()
        local = store.gradients(layer, replicas)
        for tensors in (local.w_in, local.w_out, local.b_in or [], local.b_out or []):
            for tensor in tensors:
                tensor.add_(value_of(rank))
        store.start_reduce(layer, replicas)
        store.finish_backward()
        for expert in store.owned(layer):
            expected = sum(value_of(holder) for holder in np.flatnonzero(placement.holders_ED[expert])) / size
            for name in store.spec.shapes:
                assert (store.stack(name).grad[store.row_of(layer, expert)] == expected).all(), (expert, name)
        expert_bytes = ExpertBytes(store.spec.numel, gradient_itemsize=dtype.itemsize)
        assert store.traffic.reduced == returned_bytes(placement, rank, expert_bytes)
        for name in store.spec.shapes:
            store.stack(name).grad = None


def check_routes_mirror_each_other(groups: ExpertGroups, device: str) -> None:
    """Rows arrive in the order that the receiver expects, and come back in that in which they were sent."""
    placement = placements(own_evenly(1, NUM_EXPERTS, groups.size)[0], groups.size)["chance"]
    route = Route.of(placement, groups.rank)
    sent = torch.tensor([[100.0 * groups.rank + expert] for expert in route.sent], device=device).view(-1, 1)
    received = sparse_all_gather(sent, route, groups.parameters, what="testing").wait()
    assert received.flatten().tolist() == [100.0 * placement.owner_E[expert] + expert for expert in route.received]
    assert torch.equal(sparse_reduce_scatter(received, route, groups.parameters, what="testing").wait(), sent)


def meshes(device: str) -> Iterator[tuple[DeviceMesh, int]]:
    """Meshes, and over how many ranks each averages gradients."""
    world_size = dist.get_world_size()
    yield init_device_mesh(device, (world_size,)), world_size
    if world_size == 4:  # groups smaller than the world: replicated, and each a world of its own
        yield init_device_mesh(device, (2, 2), mesh_dim_names=("replicate", "experts")), 4
        yield init_device_mesh(device, (2, 2), mesh_dim_names=("stage", "experts"))["experts"], 2


def check_all(device: str = "cpu") -> None:
    for mesh, world_size in meshes(device):
        groups = ExpertGroups.of_mesh(mesh, timeout=TIMEOUT, devices_per_node=1)
        assert groups.size * groups.num_groups == groups.world_size == world_size
        assert groups.replica_rank * groups.size + groups.rank == dist.get_rank() % world_size
        check_routes_mirror_each_other(groups, device)
        for spec in (SPEC, ExpertSpec(dim=3, ffn_dim=5, activation="gelu", bias=True)):
            store = filled_store(groups, spec, device)
            store.requires_gradient_sync = False
            for layer in range(NUM_LAYERS):
                for placement in placements(store.owners_LE[layer], groups.size).values():
                    for dtype in (torch.float32, torch.bfloat16):
                        check_replicas(store, layer, placement, dtype)
                        check_gradients(store, layer, placement, dtype)
    if dist.get_world_size() == 4:
        check_nodes_are_the_hosts(init_device_mesh(device, (4,)))


def check_nodes_are_the_hosts(mesh: DeviceMesh) -> None:
    with mock.patch("socket.gethostname", return_value=f"host-{dist.get_rank() // 2}"):
        assert ExpertGroups.of_mesh(mesh).topology == Topology(4, 2)
    with (
        mock.patch("socket.gethostname", return_value=f"host-{dist.get_rank() % 2}"),
        pytest.raises(
            ShardingError, match=r"are on the hosts \['host-0', 'host-1', 'host-0', 'host-1'\] in this order"
        ),
    ):
        ExpertGroups.of_mesh(mesh)
    with pytest.raises(ShardingError, match=r"a mesh of 3 dimensions, .* does not say which ranks share the experts"):
        ExpertGroups.of_mesh(init_device_mesh(mesh.device_type, (2, 2, 1)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_replicas_are_their_owners_bits_and_gradients_come_back_once(world_size: int) -> None:
    run_distributed(check_all, world_size)


@requires_gpu
def test_collectives_work_on_gpus() -> None:
    run_distributed(check_all, min(torch.cuda.device_count(), 4), "cuda", backend="nccl")


def spread_over_both_ranks() -> tuple[ExpertStore, Placement]:
    dist.barrier()  # ranks whose collectives have a short limit begin together
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = ExpertGroups.of_mesh(mesh, timeout=timedelta(seconds=5), devices_per_node=1)
    store = filled_store(groups, SPEC)
    return store, placements(store.owners_LE[0], groups.size)["everywhere"]


def gathering(store: ExpertStore, placement: Placement) -> Callable[[], object]:
    return lambda: store.start_gather(0, placement, torch.float32).wait()


def reducing(store: ExpertStore, placement: Placement) -> Callable[[], object]:
    replicas = store.start_gather(0, placement, torch.float32).wait()
    store.gradients(0, replicas)
    if dist.get_rank() == 0:
        store.start_reduce(0, replicas)
    return store.finish_backward


def wait_for_a_rank_that_stalls() -> list[str]:
    """Rank 1 does not come, first to spAG and then to spRS, until rank 0 has given up on it."""
    default_store = dist.distributed_c10d._get_default_store()
    said = []
    for prepare in (gathering, reducing):
        # Made anew: a group in which a rank has given up is of no more use.
        collective = prepare(*spread_over_both_ranks())
        if dist.get_rank() == 1:
            default_store.wait([prepare.__name__], timedelta(seconds=60))
            continue
        with pytest.raises(RuntimeError, match="Timed out waiting 5000ms") as error:
            collective()
        said += error.value.__notes__
        default_store.set(prepare.__name__, "given up")
    return said


def test_a_rank_that_stalls_keeps_the_others_no_longer_than_the_timeout() -> None:
    said, _ = run_distributed(wait_for_a_rank_that_stalls, 2, timeout_s=120)
    assert "while gathering the experts of layers.0.moe.experts" in said[0]
    assert "while reducing the gradients of the experts of layers.0.moe.experts" in said[1]


def die_on_one_rank() -> None:
    store, placement = spread_over_both_ranks()
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(7)
    store.start_gather(0, placement, torch.float32).wait()


def test_a_rank_that_dies_is_an_error_on_the_others() -> None:
    with pytest.raises(DistributedTestError, match=r"rank 1: died without a word \(exit code 7\)") as error:
        run_distributed(die_on_one_rank, 2, timeout_s=120)
    assert "rank 0: Traceback" in str(error.value)
    assert "while gathering the experts of layers.0.moe.experts" in str(error.value)

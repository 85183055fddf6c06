"""Passes in flight, transfers ahead of their layers, and loads at the edge, on two ranks."""

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.moe import MoELayer
from sparsetrain.moe.placement import ExpertBytes, Placement, materialised_bytes
from sparsetrain.parallel import MoEController, parallelize
from sparsetrain.parallel.fssdp.controller import runtimes_of
from sparsetrain.parallel.fssdp.replicas import LocalExperts, Replicas
from sparsetrain.parallel.fssdp.step_planner import Measured, StepPlanner
from sparsetrain.sharding import weight_shards
from sparsetrain.testing import assert_close, run_distributed

DIM, NUM_EXPERTS = 8, 4


class Model(nn.Module):
    """MoE layers, called last to first if `is_reversed`."""

    def __init__(
        self, num_layers: int = 2, *, checkpointed: bool = False, is_reversed: bool = False, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.is_reversed = checkpointed, is_reversed
        self.layers = nn.ModuleList(MoELayer(DIM, 12, NUM_EXPERTS, 2, **options) for _ in range(num_layers)).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers) if self.is_reversed else self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def spread(model: Model, **options: Any) -> nn.Module:
    """The model over both ranks, the second expert of the first rank replicated on the second one and vice versa."""
    parallelize(model, experts="fssdp", options=FssdpConfig(replan="never", pipeline=2, **options), shard=None)
    (runtime,) = runtimes_of(model)
    for at, owner_E in enumerate(runtime.store.owners_LE):
        holders_ED = Placement.of_owners(owner_E, 2).holders_ED
        holders_ED[[1, 2]] = True
        runtime.placements[at] = Placement(owner_E, holders_ED)
    return model


def inputs(sizes: list[int], seed: int) -> Tensor:
    """This rank's tokens."""
    x = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.split(sizes)[dist.get_rank()]


def assert_same_gradients(model: nn.Module, oracle: nn.Module) -> None:
    """Gradients are means over ranks, the oracle's sums."""
    wanted = {shard.name: shard for shard in weight_shards(oracle)}
    for shard in weight_shards(model):
        if ".experts." in shard.name:
            gradient, expected = shard.local_grad(), wanted[shard.name].local_grad()
            assert gradient is not None
            assert expected is not None
            assert_close(gradient * 2, shard.cut(expected), rtol=1e-9)


def check_two_passes_in_flight() -> None:
    """The second rank has no tokens: its own numbers do not tell it which pass is being recomputed."""
    passes = [inputs([size, 0], seed) for seed, size in enumerate((9, 14))]
    oracle = Model()
    for seed, size in enumerate((9, 14)):
        x = torch.randn(size, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        oracle(x).square().sum().backward()
    for order in ([0, 1], [1, 0]):
        for rematerialise in (False, True):
            model = spread(Model(checkpointed=True), rematerialise=rematerialise)
            losses = [model(x.clone().requires_grad_()).square().sum() for x in passes]
            for which in order:
                losses[which].backward()
            assert_same_gradients(model, oracle)


def check_order_of_transfers() -> None:
    """From the second pass on, replicas set out when the layer before is done, whatever order layers are called in."""
    model = spread(Model(is_reversed=True))
    (runtime,) = runtimes_of(model)
    events: list[str] = []
    gather, begin = runtime.store.start_gather, runtime.begin

    def start_gather(layer: int, *rest: Any) -> Any:
        events.append(f"gather {layer}")
        return gather(layer, *rest)

    def begin_layer(layer: int, *rest: Any) -> Any:
        events.append(f"layer {layer}")
        return begin(layer, *rest)

    runtime.store.start_gather, runtime.begin = start_gather, begin_layer  # type: ignore[method-assign]
    x = inputs([3, 4], 0)
    with torch.no_grad():
        model(x)
        events.clear()
        model(x)
    assert events == ["gather 1", "layer 1", "gather 0", "layer 0"]


def check_replicas_of_old_weights_are_not_used() -> None:
    """A pass that ends early leaves replicas on their way; a step later they are old."""
    model = spread(Model())
    runtime = runtimes_of(model)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)  # which changes the second layer, too
    x = inputs([6, 5], 0)
    runtime.begin_forward()
    model.layers[0](x).sum().backward()  # the replicas of the second layer have set out
    optimizer.step()
    found = model.layers[1](x)
    fresh = spread(Model())
    for ours, theirs in zip(weight_shards(fresh), weight_shards(model), strict=True):
        ours.local_weight().copy_(theirs.local_weight())
    assert_close(found, fresh.layers[1](x))


def check_all_tokens_to_one_rank() -> None:
    """Every row wants one of two experts of the first rank, one of which the second rank holds, too."""
    oracle, model = Model(), spread(Model())
    for either in (oracle, model):
        for layer in either.layers:
            with torch.no_grad():
                layer.router.weight.fill_(-1.0)
                layer.router.weight[:2] = torch.tensor([[2.0], [1.0]])
    x = inputs([5, 8], 0).abs()
    model(x).square().sum().backward()
    whole = torch.randn(13, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    oracle(whole).square().sum().backward()
    assert_same_gradients(model, oracle)
    plan = runtimes_of(model)[0].last_plans[0]
    assert plan.counts_ES[2:].sum() == 0
    assert plan.load_D.sum() == 26
    assert plan.load_D.max() <= 14


def check_experts_learn_where_nothing_before_them_does() -> None:
    """Neither tokens nor their weights have gradients, and one rank has no tokens."""
    oracle, model = Model(num_layers=1), spread(Model(num_layers=1))
    for either in (oracle, model):
        either.layers[0].router.requires_grad_(False)
    model(inputs([9, 0], 0)).square().sum().backward()
    oracle(
        torch.randn(9, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).square().sum().backward()
    assert_same_gradients(model, oracle)


def check_frozen_experts_stay_frozen() -> None:
    """All weights of the first layer, and one of the second; nothing before them is trained."""
    oracle, model = (Model(num_layers=3).requires_grad_(False) for _ in range(2))
    for either in (oracle, model):
        for parameter in (either.layers[1].experts.w_out, *either.layers[2].experts.parameters()):
            parameter.requires_grad_()
    parallelize(model, experts="fssdp", shard=None)
    trained = [[each for each in either.parameters() if each.requires_grad] for either in (oracle, model)]
    optimizers = [torch.optim.SGD(each, lr) for each, lr in zip(trained, (0.01, 0.02), strict=True)]  # sums and means
    MoEController(model, optimizers[1])
    for seed in range(3):
        x = torch.randn(13, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wanted, found = oracle(x), model(inputs([9, 4], seed))
        assert_close(found, wanted.split([9, 4])[dist.get_rank()])
        for y, optimizer in ((wanted, optimizers[0]), (found, optimizers[1])):
            y.square().sum().backward()
            optimizer.step()
    stores = [runtime.store for runtime in runtimes_of(model)]
    assert [len(store.layer_paths) for store in stores] == [1, 1, 1]
    have = [[parameter.grad is not None for parameter in store.parameters()] for store in stores]
    assert have == [[False, False], [False, True], [True, True]]
    assert not any(runtime._records._records for runtime in runtimes_of(model)), "calls of earlier steps are kept"


def check_peak_of_replicas(*, rematerialise: bool) -> None:
    """What is alive of replicas, whenever some are made: two layers' weights and one layer's gradients, or the formula.

    Waiting for an excess to go away is waiting for a thread of gloo that lets go late, or for the time limit.
    """
    model = spread(Model(num_layers=5), rematerialise=rematerialise)
    (runtime,) = runtimes_of(model)
    store, expert = runtime.store, ExpertBytes(runtime.store.spec.numel, replica_itemsize=8, gradient_itemsize=8)
    allowed = materialised_bytes(runtime.placements, dist.get_rank(), expert, freed=rematerialise)
    assert allowed == (3 if rematerialise else 6) * expert.replica
    made: dict[StorageWeakRef, int] = {}
    peaks: list[int] = []

    def see(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        made[StorageWeakRef(storage)] = storage.nbytes()
        del storage, tensor
        while (alive := sum(size for each, size in made.items() if not each.expired())) > allowed:
            os.sched_yield()
        peaks.append(alive)

    gather, gradients = store.start_gather, store.gradients

    def start_gather(*arguments: Any) -> Replicas:
        replicas = gather(*arguments)
        see(replicas.room)
        return replicas

    def open_gradients(layer: int, replicas: Replicas) -> LocalExperts:
        opened = gradients(layer, replicas)
        see(replicas.gradients("w_in")[0])
        return opened

    store.start_gather, store.gradients = start_gather, open_gradients  # type: ignore[method-assign]
    model(inputs([6, 7], 0)).square().sum().backward()
    assert len(peaks) == (15 if rematerialise else 10)
    assert max(peaks) == allowed


def check_capacity(overflow: str) -> None:
    """A rank's tokens compete for its share of an expert's capacity, wherever the expert is."""
    options: dict[str, Any] = {"capacity_factor": 0.7, "overflow": overflow}
    oracle, model = Model(**options), spread(Model(**options))
    sizes = [11, 6]
    whole = torch.randn(17, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = [oracle(x) for x in whole.split(sizes)]
    sum(y.square().sum() for y in outputs).backward()
    y = model(inputs(sizes, 0))
    y.square().sum().backward()
    assert_close(y, outputs[dist.get_rank()])
    assert_same_gradients(model, oracle)
    for ours, theirs in zip(model.layers, oracle.layers, strict=True):
        dropped = ours.load.read().dropped
        assert dropped > 0
        dist.all_reduce(dropped)
        assert dropped == theirs.load.read().dropped


def check_slots_follow_measured_costs() -> None:
    """Layers with an uneven load get replicas while transfers cost little; no owner changes for it."""
    model = Model()
    parallelize(model, experts="fssdp", options=FssdpConfig(spare_slots=2, reshard_every_steps=0), shard=None)
    (runtime,) = runtimes_of(model)
    planner = StepPlanner(runtime)
    owners_LE = runtime.store.owners_LE.copy()
    load_LE = np.array([[90, 60, 5, 5], [40, 40, 40, 40]])
    found = []
    for byte_s in (1e-12, 1e-3, 1e-12):
        planner._byte_s = byte_s
        planner.plan(load_LE, Measured(expert_s=1.0, rows=640.0, layer_s=1.0, model_s=1.0, calls=4.0, ranks=2.0), None)
        found.append([placement.num_replicas for placement in runtime.placements])
    assert found[0][0] > 0
    assert found == [[found[0][0], 0], [0, 0], [found[0][0], 0]]
    assert (runtime.store.owners_LE == owners_LE).all()
    assert runtime.store.traffic.moved == 0


def check_the_paper_measures_how_many_experts_travel() -> None:
    model = Model()
    parallelize(model, experts="fssdp", options=FssdpConfig(placement="paper", reshard_every_steps=0), shard=None)
    (runtime,) = runtimes_of(model)
    planner, found = StepPlanner(runtime), []
    for byte_s in (1e-12, 1e-3):
        planner._byte_s = byte_s
        measured = Measured(expert_s=1.0, rows=640.0, layer_s=1.0, model_s=2.0, calls=4.0, ranks=2.0)
        planner.plan(np.array([[90, 60, 5, 5]] * 2), measured, None)
        found.append((runtime.hot_experts, sum(placement.num_replicas for placement in runtime.placements)))
    assert found[0][0] == NUM_EXPERTS
    assert found[0][1] > 0
    assert found[1] == (0, 0)


def check_bf16_autocast() -> None:
    oracle, model = Model().float(), spread(Model().float())
    x = inputs([300, 200], 0).float()
    whole = torch.randn(500, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model.layers[0](x), oracle.layers[0](whole)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert_close(found, expected.split([300, 200])[dist.get_rank()])


def check_all() -> None:
    check_two_passes_in_flight()
    check_order_of_transfers()
    check_replicas_of_old_weights_are_not_used()
    check_all_tokens_to_one_rank()
    check_experts_learn_where_nothing_before_them_does()
    check_frozen_experts_stay_frozen()
    check_slots_follow_measured_costs()
    check_the_paper_measures_how_many_experts_travel()
    for rematerialise in (False, True):
        check_peak_of_replicas(rematerialise=rematerialise)
    for overflow in ("drop", "pad"):
        check_capacity(overflow)
    check_bf16_autocast()


def test_passes_in_flight_transfers_and_lopsided_loads() -> None:
    run_distributed(check_all, 2, timeout_s=250)

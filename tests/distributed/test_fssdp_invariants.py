"""What must hold in every step of FSSDP under every load scenario, whatever the plans; and the oracle is one process.

Routes are forced by load traces, drawn from the scenarios or recorded; weights of the oracle are those of the owners,
so that one step's rounding cannot spread to the next.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.config.moe import Replay
from sparsetrain.moe import MoELayer, moe_layers
from sparsetrain.moe.placement import SCENARIOS, LoadTrace, Placement, TraceRecorder, scenario
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.moe.routers.replay import ReplayRouter
from sparsetrain.parallel import MoEController
from sparsetrain.parallel.fssdp import ExpertGroups, Replicas
from sparsetrain.parallel.parallelize import parallelize_experts
from sparsetrain.testing import assert_close, run_distributed

LAYERS, NUM_EXPERTS, TOP_K, DIM, FFN_DIM, TOKENS, SPARE_SLOTS, STEPS = 2, 8, 2, 8, 8, 32, 2, 3
HOT = "every token to one expert"
Weights = dict[tuple[int, int], Tensor]
"""The numbers of each (layer, expert), in a row."""


class Model(nn.Module):
    def __init__(self, trace: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        router = Replay(kind="replay", trace=trace)
        self.layers = nn.ModuleList(
            MoELayer(DIM, FFN_DIM, NUM_EXPERTS, TOP_K, router=router, layer=at) for at in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def replay_of(layer: nn.Module) -> ReplayRouter:
    router = layer.router
    assert isinstance(router, ReplayRouter)
    return router


def tokens_of(step: int, rank: int, world_size: int) -> Tensor:
    """A rank's tokens; in the second step, the last of several ranks has none."""
    num_tokens = 0 if world_size > 1 and step == 1 and rank == world_size - 1 else TOKENS - 5 * (step == 2)
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(10 * step + rank))


def run(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(x).float().square().sum()


class Oracle:
    """One process with all experts, which computes this rank's tokens; gradients are averaged over ranks."""

    def __init__(self, trace: str) -> None:
        self.model = Model(trace)

    def step(self, step: int, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Weights]:
        """The loss of this rank's tokens, and the mean over ranks of experts' gradients."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.model.zero_grad()
        for (layer, expert), row in weights.items():
            experts = self.model.layers[layer].experts
            w_in, w_out = row.split([experts.w_in[0].numel(), experts.w_out[0].numel()])
            experts.w_in.data[expert], experts.w_out.data[expert] = w_in.view(-1, DIM), w_out.view(DIM, -1)
        for layer in self.model.layers:
            replay_of(layer).source, replay_of(layer).step = rank, step
        loss = run(self.model, tokens_of(step, rank, world_size), dtype)
        (loss / world_size).backward()
        stacks = [layer.experts.get_parameter(name).grad for layer in self.model.layers for name in ("w_in", "w_out")]
        rows = torch.stack([torch.cat([stack[e].flatten() for stack in stacks]) for e in range(NUM_EXPERTS)])
        dist.all_reduce(rows)
        by_layer = rows.view(NUM_EXPERTS, LAYERS, -1)
        return loss.detach(), {(layer, expert): by_layer[expert, layer] for layer, expert in weights}


@dataclass
class Seen:
    """What a run came to on this rank."""

    losses: list[Tensor]
    grads: list[Weights]
    replicas: int = 0
    kept_in_node: int = 0


class Run:
    """A model whose experts are spread over the ranks, looked at in every step."""

    def __init__(self, trace: str, groups: ExpertGroups, dtype: torch.dtype, **options: Any) -> None:
        self.groups, self.dtype, self.rank = groups, dtype, groups.rank
        self.options = FssdpConfig(
            spare_slots=SPARE_SLOTS, replan="always", reshard_every_steps=0, pipeline=2, **options
        )
        self.model = Model(trace)
        (self.runtime,) = parallelize_experts(self.model, groups, "fssdp", self.options)
        for _, layer in moe_layers(self.model):
            replay_of(layer).source = self.rank
        self.store = self.runtime.store
        self.optimizer = torch.optim.AdamW(self.store.parameters(), lr=0.01)
        self.controller = MoEController(self.model, self.optimizer)
        self.oracle = Oracle(trace)
        self.gathered: list[Replicas] = []
        self.missing: list[int] = []
        """Of each of them, how many experts this rank did not have."""
        self._watch_gathering()

    def _watch_gathering(self) -> None:
        start_gather = self.store.start_gather

        def watched(layer: int, placement: Placement, dtype: torch.dtype, besides: Replicas | None = None) -> Replicas:
            here = set(self.store.owned(layer)) | set(besides.experts if besides else ())
            self.missing.append(len(set(np.flatnonzero(placement.holders_ED[:, self.rank])) - here))
            self.gathered.append(start_gather(layer, placement, dtype, besides))
            return self.gathered[-1]

        self.store.start_gather = watched  # type: ignore[method-assign]

    def steps(self) -> Seen:
        seen = Seen([], [])
        for step in range(STEPS):
            self.check_owners()
            weights = self.everywhere(self.owned(gradients=False))
            self.optimizer.zero_grad()
            self.gathered.clear()
            self.missing.clear()
            loss = run(self.model, tokens_of(step, self.rank, self.groups.size), self.dtype)
            self.check_replicas(weights)
            loss.backward()
            self.check_traffic()
            seen.grads.append(self.owned(gradients=True))
            seen.losses.append(loss.detach())
            if not self.options.rematerialise:  # which is compared with a run without, bit for bit
                self.check_against_oracle(step, loss.detach(), weights, seen.grads[-1])
            for layer in range(LAYERS):
                seen.replicas += self.check_plan(layer)
                seen.kept_in_node += self.check_deliveries(layer)
            self.optimizer.step()
            if step == 0:
                owners_LE = self.store.owners_LE
                draw = np.random.default_rng(7)
                self.store.reshard(draw.permutation(owners_LE.ravel()).reshape(owners_LE.shape), self.optimizer)
        return seen

    def owned(self, *, gradients: bool) -> Weights:
        """The experts that this rank owns."""
        stacks = [self.store.stack(name) for name in self.store.spec.shapes]
        tensors = [stack.grad if gradients else stack.detach() for stack in stacks]
        places = [(layer, expert) for layer in range(LAYERS) for expert in self.store.owned(layer)]
        return {place: torch.cat([t[self.store.row_of(*place)].flatten() for t in tensors]) for place in places}

    def everywhere(self, owned: Weights) -> Weights:
        parts: list[Weights] = [{}] * self.groups.size
        dist.all_gather_object(parts, owned)
        assert sum(map(len, parts)) == LAYERS * NUM_EXPERTS  # nobody owns what another owns
        return {place: part[place] for part in parts for place in sorted(part)}

    def check_owners(self) -> None:
        owners_LE = self.store.owners_LE
        np.testing.assert_array_equal(np.bincount(owners_LE.ravel()), LAYERS * NUM_EXPERTS // self.groups.size)
        assert self.store.num_owned == LAYERS * NUM_EXPERTS // self.groups.size
        assert [np.flatnonzero(owner_E == self.rank).tolist() for owner_E in owners_LE] == [
            self.store.owned(layer) for layer in range(LAYERS)
        ]

    def check_replicas(self, weights: Weights) -> None:
        """After the forward pass: replicas are their owners bit for bit, or are no longer held."""
        planned = {layer: plan.placement for layer, plan in self.runtime.last_plans.items()}
        used = [replicas for replicas in self.gathered if replicas.placement is planned[replicas.layer]]
        assert [replicas.layer for replicas in used] == [at for at in range(LAYERS) if planned[at].num_replicas]
        for replicas in self.gathered:
            assert replicas.experts == tuple(replicas.placement.replicas_of(self.rank))
            assert replicas.dtype == self.dtype
            if self.options.rematerialise or replicas not in used:
                with pytest.raises(AssertionError, match="after they were freed"):
                    replicas.weights("w_in")
                continue
            stacks = [replicas.weights(name) for name in self.store.spec.shapes]
            for expert, parts in zip(replicas.experts, zip(*stacks, strict=True), strict=True):
                expected = weights[replicas.layer, expert].to(self.dtype)
                assert_bitwise(torch.cat([part.flatten() for part in parts]), expected)

    def check_traffic(self) -> None:
        """Bytes that came are those of replicas that were not there, again where they were freed."""
        planned = [plan.placement for plan in self.runtime.last_plans.values()]
        for placement in planned:
            times = sum(replicas.placement is placement for replicas in self.gathered)
            assert times == (0 if not placement.num_replicas else 2 if self.options.rematerialise else 1)
        assert self.store.traffic.gathered == sum(self.missing) * self.store.expert_bytes(self.dtype)

    def check_against_oracle(self, step: int, loss: Tensor, weights: Weights, grads: Weights) -> None:
        expected_loss, expected = self.oracle.step(step, weights, self.dtype)
        exact = self.dtype == torch.float32
        assert_close(loss, expected_loss, rtol=1e-5 if exact else 2e-2, atol=0.0)
        for place, grad in grads.items():
            largest = float(expected[place].abs().max())
            rtol, atol = (1e-4, 1e-5 * largest + 1e-7) if exact else (0.0, 5e-2 * largest + 1e-3)
            assert_close(grad, expected[place], rtol=rtol, atol=atol)

    def check_plan(self, layer: int) -> int:
        """The same on all ranks, on the store's owners, and within the spare slots; returns the number of replicas."""
        plan = self.runtime.last_plans[layer]
        placement, owner_E = plan.placement, self.store.owners_LE[layer]
        np.testing.assert_array_equal(placement.owner_E, owner_E)
        assert placement.holders_ED[np.arange(NUM_EXPERTS), owner_E].all()
        assert max(len(placement.replicas_of(device)) for device in range(self.groups.size)) <= SPARE_SLOTS
        if self.options.hot_experts is not None:
            assert (placement.holders_ED.sum(axis=1) > 1).sum() <= self.options.hot_experts
        own = torch.tensor([placement.fingerprint, plan.fingerprint])
        every = own.new_empty(self.groups.size, 2)
        dist.all_gather(list(every.unbind()), own)
        assert (every == own).all()
        return placement.num_replicas

    def check_deliveries(self, layer: int) -> int:
        """Every row goes to one holder; returns the rows that the paper's dispatch must keep in their node."""
        plan, topology = self.runtime.last_plans[layer], self.groups.topology
        holders_ED, received_DSE, kept = plan.placement.holders_ED, [], 0
        for source in range(self.groups.size):
            sent_ED = plan.sent_by(source)
            rows = TOP_K * len(tokens_of(self.controller.step, source, self.groups.size))
            assert sent_ED.min() >= 0
            assert sent_ED.sum() == rows
            np.testing.assert_array_equal(sent_ED.sum(axis=1), plan.counts_ES[:, source])
            assert not sent_ED[~holders_ED].any()
            received_DSE.append(sent_ED.T)
            if self.options.dispatch == "paper":
                near_D = topology.node_D == topology.node_D[source]
                is_near_E = holders_ED[:, near_D].any(axis=1)
                assert not sent_ED[is_near_E][:, ~near_D].any()
                assert not np.delete(sent_ED[holders_ED[:, source]], source, axis=1).any()
                kept += int(sent_ED[is_near_E].sum())
        for device, received_SE in enumerate(np.stack(received_DSE, axis=1)):
            np.testing.assert_array_equal(plan.received_by(device), received_SE)
        return kept


def assert_bitwise(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def check_scenarios(traces: dict[str, str]) -> None:
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    groups = ExpertGroups.of_mesh(mesh, devices_per_node=2 if world_size == 4 else None)
    for name, trace in traces.items():
        for dtype in (torch.float32, torch.bfloat16):
            hot = None if dtype == torch.float32 else 1
            kept = Run(trace, groups, dtype, hot_experts=hot).steps()
            freed = Run(trace, groups, dtype, hot_experts=hot, rematerialise=True).steps()
            assert_bitwise(torch.stack(freed.losses), torch.stack(kept.losses))
            for ours, theirs in zip(freed.grads, kept.grads, strict=True):
                assert ours.keys() == theirs.keys()
                for place, grad in ours.items():
                    assert_bitwise(grad, theirs[place])
            if name in ("L4", HOT):
                assert (kept.replicas > 0) == (world_size > 1)  # else this file checks too little
        assert Run(trace, groups, torch.float32, dispatch="paper").steps().kept_in_node > 0


def draw_traces(folder: Path, world_size: int) -> dict[str, str]:
    """A trace of each scenario, by name; L5's hot expert has moved in every step, and L8 is that of a run."""
    recorded = record(world_size)
    loads = {}
    for name in SCENARIOS:
        of_layers = [
            scenario(name, NUM_EXPERTS, world_size, seed=layer, layer=layer, trace=recorded if name == "L8" else None)
            for layer in range(LAYERS)
        ]
        loads[name] = np.array(
            [
                [layer.counts_SE(step if name == "L8" else 10 * step, TOP_K * TOKENS) for layer in of_layers]
                for step in range(STEPS)
            ]
        )
    loads[HOT] = np.zeros_like(loads["L8"])
    loads[HOT][..., 5] = TOP_K * TOKENS
    paths = {}
    for name, load_NLSE in loads.items():
        paths[name] = str(folder / f"{name}.npz")
        trace_of(load_NLSE).save(paths[name])
    return paths


def record(world_size: int) -> LoadTrace:
    """The load of a run: routers learn, and every rank has tokens of a kind of its own."""
    torch.manual_seed(1)
    model = nn.ModuleList(MoELayer(DIM, FFN_DIM, NUM_EXPERTS, TOP_K) for _ in range(LAYERS))
    optimizer, recorder = torch.optim.SGD(model.parameters(), lr=0.3), TraceRecorder(TOP_K)
    for step in range(STEPS):
        loads = []
        for rank in range(world_size):
            x = tokens_of(3, rank, world_size) + 1.5 * torch.randn(DIM, generator=torch.Generator().manual_seed(rank))
            for layer in model:
                x = x + layer(x)
            x.square().mean().backward()
            loads.append(np.stack([layer.load.take().counts_E.numpy() for layer in model]))
        recorder.append(step, sum(loads), np.stack(loads, axis=1))
        optimizer.step()
        optimizer.zero_grad()
    return recorder.trace()


def trace_of(load_NLSE: IntArray) -> LoadTrace:
    return LoadTrace(np.arange(STEPS), load_NLSE.sum(axis=2), TOP_K, load_NLSE)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_invariants_hold_under_every_load(world_size: int, tmp_path: Path) -> None:
    run_distributed(check_scenarios, world_size, draw_traces(tmp_path, world_size), timeout_s=400)

"""Plans for the next step of one store's layers, from the load and the costs of the steps before.

Everything here is a function of numbers that were summed over all ranks, so every rank comes to the same plans.

Shapes: L layers of the store, E experts, D ranks of an expert group.
"""

import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import Optimizer

from sparsetrain.moe.placement import (
    CostModel,
    LoadForecast,
    Placement,
    fastest_placement,
    materialise_layers,
    reshard_owners,
    slots_to_try,
)
from sparsetrain.moe.placement.topology import FloatArray, IntArray
from sparsetrain.parallel.fssdp.adaptivity import Trial
from sparsetrain.parallel.fssdp.agreement import check_placements
from sparsetrain.parallel.fssdp.runtime import Runtime
from sparsetrain.parallel.fssdp.store import Traffic

_DEGREES = (1, 2, 4)
_CALIBRATED_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Measured:
    """What a step came to on one rank, or on all together: fields add up."""

    expert_s: float = 0.0
    """Seconds in experts."""
    rows: float = 0.0
    """Rows that they were given, those of the forward and the backward pass counted apart."""
    layer_s: float = 0.0
    """Seconds from when rows set out until they were back."""
    model_s: float = 0.0
    """Seconds of forward and backward passes of the whole model."""
    calls: float = 0.0
    """Forward passes of layers, those with gradients."""
    imbalance: float = 0.0
    """Rows of the fullest rank over the mean, summed over calls."""
    replicas: float = 0.0
    """Replicas on all ranks of an expert group, summed over calls."""
    moved_bytes: float = 0.0
    """Bytes of experts that came here."""
    ranks: float = 1.0

    @property
    def values(self) -> tuple[float, ...]:
        """All fields, in order."""
        return astuple(self)


class StepPlanner:
    """Decides for the layers of one store. Collective when it is made: it times a transfer between ranks.

    Args:
        runtime: Whose plans to make.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self._options = runtime, runtime.options
        self._forecast = LoadForecast(self._options.forecast_steps)
        self._since_resharding: FloatArray | None = None
        self._steps_since = 0
        self._byte_s = _seconds_per_byte(runtime) if runtime.store.groups.size > 1 else 0.0
        slots = -(-runtime.store.num_experts // runtime.store.groups.size)
        fixed = isinstance(self._options.pipeline, int) or runtime.store.groups.size == 1
        self._degree = Trial([runtime.degree] if fixed else [degree for degree in _DEGREES if degree <= slots])

    def measure(self) -> Measured:
        """What this rank measured since it was last asked."""
        runtime = self.runtime
        expert_s, rows = runtime.expert_watch.take()
        layer_s, _ = runtime.layer_watch.take()
        model_s, _ = runtime.model_watch.take()
        calls, imbalance, replicas = runtime.calls, runtime.imbalance, runtime.used_replicas
        runtime.calls, runtime.imbalance, runtime.used_replicas = 0, 0.0, 0
        traffic, runtime.store.traffic = runtime.store.traffic, Traffic()
        moved = traffic.gathered + traffic.reduced + traffic.moved
        return Measured(expert_s, rows, layer_s, model_s, calls, imbalance, replicas, moved)

    def plan(self, load_LE: IntArray, total: Measured, optimizer: Optimizer | None) -> bool:
        """Make the next step's plans; collective.

        Args:
            load_LE: int64, assignments to each expert in the step, over all ranks.
            total: What all ranks measured, added up.
            optimizer: Whose state moves with experts.

        Returns:
            Whether experts have changed owners.

        Raises:
            PlacementError: Ranks came to different plans.
        """
        if total.rows:
            self._degree.observe(total.layer_s / total.rows)
            self.runtime.degree = self._degree.chosen
        if not self.runtime.replicates:
            return False
        self._forecast.update(load_LE)
        before = np.zeros(load_LE.shape) if self._since_resharding is None else self._since_resharding
        self._since_resharding = load_LE.astype(np.float64) + before
        self._steps_since += 1
        resharded = self._reshard_if_due(optimizer)
        self.runtime.cost = self._cost(total)
        self._place(total)
        store = self.runtime.store
        check_placements(self.runtime.placements, store.layer_paths, store.groups.parameters)
        return resharded

    def state_dict(self) -> dict[str, Any]:
        """Owners, and what plans are made from; plain values and tensors."""
        loads = [torch.from_numpy(load_LE) for load_LE in self._forecast.loads]
        since = None if self._since_resharding is None else torch.from_numpy(self._since_resharding)
        owners = torch.from_numpy(self.runtime.store.owners_LE)
        return {"owners": owners, "forecast": loads, "since": since, "steps_since": self._steps_since}

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizer | None) -> None:
        """Go on from `state_dict`, of which a number of ranks other than then keeps the loads alone; collective."""
        for load_LE in state["forecast"]:
            self._forecast.update(load_LE.numpy())
        self._since_resharding = None if state["since"] is None else state["since"].numpy()
        self._steps_since = state["steps_since"]
        owners_LE = state["owners"].numpy()
        store = self.runtime.store
        before, after = (np.bincount(o.ravel(), minlength=store.groups.size) for o in (store.owners_LE, owners_LE))
        if np.array_equal(before, after):
            store.reshard(owners_LE, optimizer)
        self._place(Measured())

    def _reshard_if_due(self, optimizer: Optimizer | None) -> bool:
        every, store = self._options.reshard_every_steps, self.runtime.store
        if not every or self._steps_since < every or self._since_resharding is None:
            return False
        owners_LE = reshard_owners(
            self._since_resharding / self._steps_since, store.owners_LE, self.runtime.topology,
            slots=self._options.spare_slots, hot=self.runtime.hot_experts, method=self._options.placement,
        )  # fmt: skip
        self._since_resharding, self._steps_since = None, 0
        if np.array_equal(owners_LE, store.owners_LE):
            return False
        store.reshard(owners_LE, optimizer)
        return True

    def _cost(self, total: Measured) -> CostModel | None:
        if not total.rows or not total.calls:
            return None
        return CostModel(
            row_s=2 * total.expert_s / total.rows,
            expert_bytes=self.runtime.store.expert_bytes(self.runtime.compute_dtype),
            byte_s=self._byte_s,
            free_s=max(0.0, total.model_s - total.layer_s) / total.calls,
        )

    def _place(self, total: Measured) -> None:
        """Replicas of the next step: in each layer as many as are worth their transfers."""
        options, store, runtime = self._options, self.runtime.store, self.runtime
        mean_LE, owned = self._forecast.mean_LE, runtime.owners_alone()
        if mean_LE is None or not options.spare_slots:
            runtime.placements = owned
            return
        runtime.hot_experts = self._hot_experts()
        if options.replan != "auto" or runtime.cost is None:  # nothing that is measured has a say
            runtime.placements = self._materialise(mean_LE, options.spare_slots)
            return
        tried = [self._materialise(mean_LE, slots) for slots in slots_to_try(options.spare_slots)]
        groups, passes = store.groups, max(1.0, total.calls / total.ranks / store.num_layers)
        rows_LE = mean_LE / passes / groups.num_groups  # of a pass, in one expert group
        runtime.placements = [
            fastest_placement(rows_E, alone, others, runtime.cost)
            for rows_E, alone, *others in zip(rows_LE, owned, *tried, strict=True)
        ]

    def _materialise(self, load_LE: FloatArray, slots: int) -> list[Placement]:
        runtime = self.runtime
        return materialise_layers(
            load_LE, runtime.store.owners_LE, runtime.topology,
            slots=slots, hot=runtime.hot_experts, method=self._options.placement,
        )  # fmt: skip

    def _hot_experts(self) -> int | None:
        """How many experts may have replicas: what is set, or what the paper computes from measured costs."""
        options, cost = self._options, self.runtime.cost
        if options.hot_experts is None and options.placement == "paper" and options.replan == "auto" and cost:
            return cost.hot_experts(self.runtime.store.num_experts)
        return options.hot_experts


def _seconds_per_byte(runtime: Runtime) -> float:
    """Seconds to move a byte into a rank while all ranks move some: the fastest of a few tries; collective."""
    group, size = runtime.store.groups.parameters, runtime.store.groups.size
    device = runtime.store.stack("w_in").device
    sent = torch.zeros(_CALIBRATED_BYTES // size * size, dtype=torch.uint8, device=device)
    received, fastest = torch.empty_like(sent), float("inf")
    for _ in range(3):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    mean = torch.tensor(fastest, dtype=torch.float64, device=device)
    dist.all_reduce(mean, group=group)
    if runtime.store.groups.replicate is not None:
        dist.all_reduce(mean, group=runtime.store.groups.replicate)
    return float(mean) / runtime.store.groups.world_size / (sent.numel() * (size - 1) / size)

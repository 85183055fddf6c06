"""What the layers of a store share while a model runs: plans, replicas on their way, and how long experts take.

A plan is made in two parts. Which experts get replicas is decided once a step, from a forecast, so that their weights
travel while attention computes: those of the next layer start when a layer's experts are done. Which rows go where is
decided once the gate has spoken, by every rank for itself from the counts of all.

Shapes: S ranks of the expert group, E experts.
"""

import contextlib
import weakref
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from sparsetrain_kernels.precision import compute_dtype
from torch.distributed import ProcessGroup

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.errors import PlacementError
from sparsetrain.moe import Routing
from sparsetrain.moe.placement import CostModel, Dispatch, Placement, dispatch, materialise
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.agreement import described, raise_mismatch
from sparsetrain.parallel.fssdp.exchange import Exchange
from sparsetrain.parallel.fssdp.replicas import LocalExperts, Replicas
from sparsetrain.parallel.fssdp.stopwatch import Stopwatch
from sparsetrain.parallel.fssdp.store import ExpertStore
from sparsetrain.sharding import Move


@dataclass(eq=False)
class Call:
    """One pass of one layer, from its gate to the end of its backward pass."""

    runtime: "Runtime"
    layer: int
    dtype: torch.dtype
    counts_E: list[int]
    """This rank's rows of each expert."""
    dispatch: Dispatch
    exchange: Exchange
    replicas: Replicas | None
    """None where there are none, and while they are freed."""
    is_recomputed: bool = False

    @property
    def store(self) -> ExpertStore:
        """Where the experts are."""
        return self.runtime.store

    @property
    def tokens(self) -> ProcessGroup:
        """The ranks that rows travel between."""
        return self.store.groups.experts

    @property
    def activation(self) -> str:
        """Of the experts."""
        return self.store.spec.activation

    @property
    def path(self) -> str:
        """Of the experts, for messages."""
        return self.store.layer_paths[self.layer]

    def local_experts(self, *, keep: bool) -> LocalExperts:
        """The weights of this rank's slots."""
        return self.store.local_experts(self.layer, self.replicas, self.dtype, keep=keep)

    def gradients(self) -> LocalExperts:
        """Where to add the gradients of this rank's slots."""
        return self.store.gradients(self.layer, self.replicas)

    def timed(self, num_rows: int) -> contextlib.AbstractContextManager[None]:
        """Measure what the experts take for so many rows."""
        return self.runtime.expert_watch.measure(num_rows)

    def gather_again(self) -> None:
        """Have the replicas that were freed on their way; collective."""
        if self.replicas is None and self.dispatch.placement.num_replicas:
            self.replicas = self.store.start_gather(self.layer, self.dispatch.placement, self.dtype)

    def begin_backward(self) -> None:
        """The gradient of the layer's output is there."""
        self.store.queue_finish()
        self.gather_again()

    def end_backward(self) -> None:
        """Send the layer's gradients home, under whatever the model computes next; collective."""
        self.store.start_reduce(self.layer, self.replicas)
        self.replicas = None
        self.runtime.forget(self)


class Runtime:
    """The layers of one store.

    Args:
        store: Their experts.
        options: What is fixed and what is measured.
        replicates: Whether there may be replicas at all, and owners change.
    """

    def __init__(self, store: ExpertStore, options: FssdpConfig, *, replicates: bool) -> None:
        self.store, self.options, self.replicates = store, options, replicates
        self.topology = store.groups.topology
        self.placements = self.owners_alone()
        """Who holds what from the next forward pass on; owners alone after each move."""
        self.degree = options.pipeline if isinstance(options.pipeline, int) else 1
        """Chunks of an exchange."""
        self.cost: CostModel | None = None
        """What re-planning after the gate goes by; agreed on by all ranks."""
        device = store.stack("w_in").device
        self.expert_watch, self.layer_watch = Stopwatch(device), Stopwatch(device)
        """Time in experts, by rows; and from when rows set out until they are back."""
        self.last_plans: dict[int, Dispatch] = {}
        """Of each layer's latest call."""
        self._gathering: dict[int, Replicas] = {}
        self._calls: list[weakref.ref[Call]] = []
        self._last_plan: tuple[int, Dispatch | None] = (0, None)
        self._num_calls, self._imbalance = 0, 0.0
        store.on_move(self._follow)

    def owners_alone(self) -> list[Placement]:
        """Expert parallelism: no replicas."""
        return [Placement.of_owners(owner_E, self.topology.num_devices) for owner_E in self.store.owners_LE]

    # The forward pass

    def begin_forward(self) -> None:
        """The model begins a forward pass: have the first layer's replicas on their way."""
        self._drop_gathered()  # for an earlier pass that did not come to these layers: their weights may be old
        self._calls = [call for call in self._calls if call() is not None]
        self._gather_ahead(0)

    def begin(self, layer: int, routing: Routing, dtype: torch.dtype) -> Call:
        """Plan a layer's pass, the router having spoken; collective.

        Raises:
            PlacementError: Ranks have different plans.
        """
        if torch._C._current_graph_task_id() != -1:
            return self._recall(layer, routing.counts_E.tolist())
        counts_SE = self._gather_counts(layer, routing)
        placement, replicas = self.placements[layer], None
        plan = dispatch(counts_SE, placement, self.topology, method=self.options.dispatch)
        better = self._better_plan(layer, counts_SE, plan)
        if better is not None:
            plan, placement = better, better.placement
        if placement.num_replicas:
            replicas = self._replicas(layer, placement, dtype)
        exchange = Exchange.of(plan, self.store.groups.rank, self.degree, routing.token_R.device)
        self.last_plans[layer], self._last_plan = plan, (layer, plan)
        self._num_calls += 1
        self._imbalance += float(plan.load_D.max() / max(plan.load_D.mean(), 1e-9)) if counts_SE.any() else 1.0
        counts_E = counts_SE[self.store.groups.rank].tolist()
        return Call(self, layer, dtype, counts_E, plan, exchange, replicas)

    def end(self, call: Call) -> None:
        """A layer's experts are done: free what may be freed, and have the next layer's replicas on their way."""
        if torch._C._current_graph_task_id() != -1:
            return
        if torch.is_grad_enabled():
            self._calls.append(weakref.ref(call))
        if call.replicas is not None and (self.options.rematerialise or not torch.is_grad_enabled()):
            call.replicas.free()
            call.replicas = None
        self._gather_ahead(call.layer + 1, call.dtype)

    def take_calls(self) -> tuple[int, float]:
        """Calls since they were last taken, and the sum of their devices' imbalance (fullest over mean)."""
        taken = self._num_calls, self._imbalance
        self._num_calls, self._imbalance = 0, 0.0
        return taken

    def forget(self, call: Call) -> None:
        """A call's backward pass is over; have what the one before it has freed on its way."""
        self._calls = [other for other in self._calls if other() is not None and other() is not call]
        if self.options.rematerialise and self._calls and (previous := self._calls[-1]()) is not None:
            previous.gather_again()

    def _recall(self, layer: int, counts_E: list[int]) -> Call:
        """The call whose activations are being computed again: it has its plan, and rows go the same ways."""
        for reference in reversed(self._calls):
            call = reference()
            if call and call.layer == layer and call.counts_E == counts_E and not call.is_recomputed:
                call.is_recomputed = True
                call.gather_again()
                return call
        raise PlacementError(
            f"{self.store.layer_paths[layer]}: a recomputed forward pass routes tokens in another way than the first "
            "one did. Activation checkpointing needs a router that is deterministic"
        )

    # Plans

    def _gather_counts(self, layer: int, routing: Routing) -> IntArray:
        """Rows of each rank for each expert, and make sure that ranks plan alike: one collective."""
        groups = self.store.groups
        last = self._last_plan[1]
        prints = [self.placements[layer].fingerprint, 0 if last is None else last.fingerprint]
        own = torch.cat([routing.counts_E, torch.tensor(prints, device=routing.counts_E.device)])
        every = own.new_empty(groups.size, len(own))
        dist.all_gather(list(every.unbind()), own, group=groups.experts)
        table = every.cpu().numpy()
        if (table[:, -2:] != table[0, -2:]).any():
            self._stop_for_mismatch(layer, table[:, -2:])
        counts_SE: IntArray = table[:, :-2]
        return counts_SE

    def _stop_for_mismatch(self, layer: int, prints_S2: IntArray) -> None:
        """Name the ranks, the layer and both plans; collective."""
        group = self.store.groups.experts
        other = int(np.flatnonzero((prints_S2 != prints_S2[0]).any(axis=1))[0])
        if (prints_S2[:, 0] != prints_S2[0, 0]).any():
            path, placement = self.store.layer_paths[layer], self.placements[layer]
            raise_mismatch(other, lambda: described(placement), group, f"place experts of {path}")
        last, plan = self._last_plan
        what = f"split rows of {self.store.layer_paths[last]}"
        raise_mismatch(other, lambda: plan.deliveries.rows_P.tolist() if plan else None, group, what)

    def _better_plan(self, layer: int, counts_SE: IntArray, plan: Dispatch) -> Dispatch | None:
        """A plan for the true load, where it is worth its transfers."""
        if (
            self.options.replan == "never"
            or not self.options.spare_slots
            or (self.options.replan == "auto" and self.cost is None)
        ):
            return None
        placement = materialise(
            counts_SE.sum(axis=0), self.store.owners_LE[layer], self.topology,
            slots=self.options.spare_slots, hot=self.options.hot_experts, method=self.options.placement,
        )  # fmt: skip
        if placement == plan.placement:
            return None
        better = dispatch(counts_SE, placement, self.topology, method=self.options.dispatch)
        if self.options.replan == "auto":
            assert self.cost is not None
            added_D = placement.holders_ED.sum(axis=0) - np.bincount(
                placement.owner_E, minlength=self.topology.num_devices
            )
            if not self.cost.pays(float(plan.load_D.max()), float(better.load_D.max()), int(added_D.max())):
                return None
        return better

    # Replicas on their way

    def _follow(self, _: Move) -> None:
        self._drop_gathered()
        self.placements = self.owners_alone()

    def _drop_gathered(self) -> None:
        for replicas in self._gathering.values():
            replicas.free()
        self._gathering.clear()

    def _gather_ahead(self, layer: int, dtype: torch.dtype | None = None) -> None:
        """Begin to bring a layer's replicas here, if there is such a layer and a plan for it."""
        if layer >= self.store.num_layers or not self.placements[layer].num_replicas or layer in self._gathering:
            return
        dtype = dtype or compute_dtype(self.store.stack("w_in"))
        self._gathering[layer] = self.store.start_gather(layer, self.placements[layer], dtype)

    def _replicas(self, layer: int, placement: Placement, dtype: torch.dtype) -> Replicas:
        """Those on their way if they are what is wanted, else others; collective."""
        ahead = self._gathering.pop(layer, None)
        if ahead is not None and ahead.placement is placement and ahead.dtype == dtype:
            return ahead
        if ahead is not None:
            ahead.free()
        return self.store.start_gather(layer, placement, dtype)

"""What the layers of a store share while a model runs: plans, replicas on their way, and how long experts take.

A plan is made in two parts. Which experts get replicas is decided once a step, from a forecast, so that their weights
travel while attention computes. Which rows go where is decided once the gate has spoken, by every rank for itself from
the counts of all.

Shapes: S ranks of the expert group, E experts.
"""

import weakref
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsetrain.config.experts import FssdpConfig
from sparsetrain.moe import Routing
from sparsetrain.moe.placement import CostModel, Dispatch, Placement, dispatch, materialise, most_replicas
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.agreement import described, gather_counts, raise_mismatch
from sparsetrain.parallel.fssdp.calls import Call, CallRecords
from sparsetrain.parallel.fssdp.exchange import Exchange
from sparsetrain.parallel.fssdp.prefetch import Prefetch
from sparsetrain.parallel.fssdp.stopwatch import Stopwatch
from sparsetrain.parallel.fssdp.store import ExpertStore


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
        self.hot_experts = options.hot_experts
        """Experts of a layer that may have replicas; None: as many as help."""
        device = store.stack("w_in").device
        self.expert_watch = Stopwatch(device)
        """Time in experts, by rows."""
        self.layer_watch = Stopwatch(device)
        """Time from when rows set out until they are back, replicas included that are waited for."""
        self.model_watch = Stopwatch(device)
        """Time from the beginning of a forward pass to the end of its backward pass."""
        self.last_plans: dict[int, Dispatch] = {}
        """Of each layer's latest call."""
        self.calls, self.imbalance, self.used_replicas = 0, 0.0, 0
        """Of calls with gradients: how many, and sums of the fullest rank's rows over the mean, and of replicas."""
        self._prefetch, self._records = Prefetch(store), CallRecords()
        self._previous: weakref.ref[Call] | None = None
        self._last_plan: tuple[int, Dispatch | None] = (0, None)
        store.on_move(lambda _: self._forget_placements())
        _follow_steps(self)

    def owners_alone(self) -> list[Placement]:
        """Expert parallelism: no replicas."""
        return [Placement.of_owners(owner_E, self.topology.num_devices) for owner_E in self.store.owners_LE]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What experts computed in last, and replicas travel in."""
        return self._prefetch.dtype

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin_forward(self) -> None:
        """The model begins a forward pass: have the first layer's replicas on their way; collective."""
        self._previous = None
        if torch.is_grad_enabled():
            self.model_watch.start()
        self._prefetch.begin(self.placements)

    def begin(self, layer: int, routing: Routing, dtype: torch.dtype) -> Call:
        """Plan a layer's pass, the router having spoken; collective.

        Raises:
            PlacementError: Ranks have different plans.
        """
        if torch._C._current_graph_task_id() != -1:
            return self._records.recall(
                self.store.layer_paths[layer], layer, routing.counts_E.tolist(),
                lambda: gather_counts(routing.counts_E, [], self.store.groups.experts)[0],
            )  # fmt: skip
        counts_SE = self._gather_counts(layer, routing)
        plan = dispatch(counts_SE, self.placements[layer], self.topology, method=self.options.dispatch)
        plan = self._better_plan(layer, plan) or plan
        replicas = self._prefetch.take(layer, plan.placement, dtype)
        exchange = Exchange.of(plan, self.store.groups.rank, self.degree, routing.token_R.device)
        self.last_plans[layer], self._last_plan = plan, (layer, plan)
        return Call(self.store, layer, dtype, plan, exchange, replicas, self.expert_watch, self.layer_watch)

    def end(self, call: Call) -> None:
        """A layer's experts are done: free what may be freed, and have the next layer's replicas on their way."""
        if torch._C._current_graph_task_id() != -1:
            return
        if torch.is_grad_enabled():
            self._remember(call)
        if self.options.rematerialise or not torch.is_grad_enabled():
            call.free_replicas()
        self._prefetch.end(call.layer, self.placements, call.dtype)

    def begin_backward(self, call: Call) -> None:
        """The gradient of a layer's output is there; collective."""
        Variable._execution_engine.queue_callback(self.model_watch.stop)
        call.begin_backward()

    def end_backward(self, call: Call) -> None:
        """The gradients of a layer's experts are complete on this rank; collective."""
        self._records.remove(call)
        call.end_backward()

    def end_step(self) -> None:
        """Weights have changed."""
        self._records.clear()
        self._prefetch.drop()

    def _remember(self, call: Call) -> None:
        self._records.add(call)
        if self.options.rematerialise:
            call.previous = self._previous() if self._previous is not None else None
            self._previous = weakref.ref(call)
        rows_D = call.plan.load_D
        self.calls += 1
        self.imbalance += float(rows_D.max() / rows_D.mean()) if rows_D.any() else 1.0
        self.used_replicas += call.plan.placement.num_replicas

    # Plans

    def _gather_counts(self, layer: int, routing: Routing) -> IntArray:
        """Rows of each rank for each expert, and make sure that ranks plan alike: one collective."""
        group, (last, plan) = self.store.groups.experts, self._last_plan
        placement = self.placements[layer]
        agreed = [placement.fingerprint, self.degree, 0 if plan is None else plan.fingerprint]
        counts_SE, agreed_S3 = gather_counts(routing.counts_E, agreed, group)
        differs_S3 = agreed_S3 != agreed_S3[0]
        if differs_S3.any():
            rank, what = (int(first[0]) for first in np.nonzero(differs_S3))
            path = self.store.layer_paths[last if what == 2 else layer]
            rows = plan.deliveries.rows_P.tolist() if plan else []
            plans = (described(placement), self.degree, rows)
            verbs = (f"place experts of {path}", f"cut rows of {path} into chunks", f"split rows of {path}")
            raise_mismatch(rank, plans[what], group, verbs[what])
        return counts_SE

    def _better_plan(self, layer: int, plan: Dispatch) -> Dispatch | None:
        """A plan for the true load, where it is worth its transfers."""
        options, cost, rows = self.options, self.cost, float(plan.load_D.max())
        is_measured = options.replan == "auto"
        if options.replan == "never" or not (self.replicates and options.spare_slots):
            return None
        if is_measured and (cost is None or not cost.pays(rows, ceil(plan.load_D.mean()), 1)):
            return None  # not even if it made all ranks equally full
        placement = materialise(
            plan.counts_ES.sum(axis=1), self.store.owners_LE[layer], self.topology,
            slots=options.spare_slots, hot=self.hot_experts, method=options.placement,
        )  # fmt: skip
        if placement == plan.placement:
            return None
        better = dispatch(plan.counts_ES.T, placement, self.topology, method=options.dispatch)
        if is_measured:
            assert cost is not None
            if not cost.pays(rows, float(better.load_D.max()), most_replicas(placement, plan.placement)):
                return None
        return better

    def _forget_placements(self) -> None:
        self._prefetch.drop()
        self.placements = self.owners_alone()


def _follow_steps(runtime: Runtime) -> None:
    """Hear of the steps of whichever optimizer has the experts."""
    reference = weakref.ref(runtime)

    def follow(optimizer: Optimizer, *_: Any) -> None:
        if (runtime := reference()) is not None and _has(optimizer, runtime.store):
            runtime.end_step()

    weakref.finalize(runtime, register_optimizer_step_post_hook(follow).remove)


def _has(optimizer: Optimizer, store: ExpertStore) -> bool:
    """Whether the optimizer updates the store, or any would do because none does."""
    stack = store.trained_stack
    groups: Sequence[dict[str, Any]] = optimizer.param_groups
    return not stack.requires_grad or any(parameter is stack for group in groups for parameter in group["params"])

"""What happens to a model's experts between two steps: load is added up, routers learn of it, new plans are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.moe import Load, moe_layers
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.experts import ShardedExperts
from sparsetrain.parallel.fssdp.runtime import Runtime
from sparsetrain.parallel.fssdp.step_planner import Measured, StepPlanner

_T = TypeVar("_T")


@dataclass(frozen=True)
class MoEReport:
    """What a step asked of the experts, and what was done about it; the same on all ranks."""

    load_LE: list[IntArray]
    """Assignments to each expert, by MoE layer, over all ranks and micro-batches, dropped ones included."""
    dropped: int
    """Assignments that found no room, all layers."""
    device_imbalance: float
    """Rows of the fullest rank of an expert group over their mean, the mean over layers; 1 where nothing is spread."""
    replicas: int
    """Copies of experts besides their owners', all layers and ranks of an expert group; the mean over passes."""
    moved_bytes: int
    """Bytes of experts (weights, gradients, optimizer state) that came to a rank over the wire, all ranks."""
    degree: int
    """Chunks of an exchange in the next step; 1 where nothing is spread."""
    resharded: bool
    """Whether experts changed owners after the step."""

    @property
    def computed(self) -> int:
        """Assignments that were served, all layers."""
        return sum(int(load_E.sum()) for load_E in self.load_LE) - self.dropped

    @property
    def expert_imbalance(self) -> float:
        """Load of the fullest expert over the mean, in the layer where that is largest."""
        return max((float(load_E.max() / max(load_E.mean(), 1.0)) for load_E in self.load_LE), default=1.0)

    @classmethod
    def of_stages(cls, stages: Sequence["MoEReport"]) -> "MoEReport":
        """That of a whole model, of those of its pipeline stages, in their order."""
        with_experts = [stage for stage in stages if stage.load_LE]
        num_layers = sum(len(stage.load_LE) for stage in with_experts)
        imbalances = [len(stage.load_LE) * stage.device_imbalance for stage in with_experts]
        return cls(
            load_LE=[load_E for stage in with_experts for load_E in stage.load_LE],
            dropped=sum(stage.dropped for stage in with_experts),
            device_imbalance=sum(imbalances) / num_layers if num_layers else 1.0,
            replicas=sum(stage.replicas for stage in with_experts),
            moved_bytes=sum(stage.moved_bytes for stage in with_experts),
            degree=max((stage.degree for stage in with_experts), default=1),
            resharded=any(stage.resharded for stage in with_experts),
        )


class MoEController:
    """Follows an optimizer's steps and looks after the experts in between.

    After every step the load of all MoE layers is summed over the data-parallel ranks. Routers get it (loss-free
    biases, schedules); where experts are spread over ranks, the next step's replicas and chunks are planned from it,
    and every so many steps experts change owners. It works for models on one device, too.

        model = parallelize(model, experts="fssdp")
        optimizer = torch.optim.AdamW(model.parameters())
        controller = MoEController(model, optimizer)

    Collective over the data-parallel ranks, to make and at every step.

    Args:
        model: Plain or parallelized, wrapped or not.
        optimizer: Whose steps to follow, and whose state moves with experts. None: call `after_step` after each.
        group: The data-parallel ranks of a model whose experts are not spread; default: all there are.
        stages: The pipeline stages, in their order, one rank of each, where `model` is one of them; `report` is then
            that of the whole model.
        total_steps: Of the training, for routers with a schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        group: ProcessGroup | None = None,
        stages: ProcessGroup | None = None,
        total_steps: int | None = None,
    ) -> None:
        self._layers = [layer for _, layer in moe_layers(model)]
        self._planners = [StepPlanner(runtime) for runtime in runtimes_of(model)]
        self._groups, self._stages = self._ranks(group), stages
        self._optimizer, self._total_steps = optimizer, total_steps
        self._handles: list[RemovableHandle] = []
        self.step = 0
        """Steps followed."""
        self.report: MoEReport | None = None
        """Of the latest."""
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._follow()))

    def detach(self) -> None:
        """Stop following the optimizer."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def after_step(self) -> MoEReport:
        """Look after the experts."""
        self.step += 1
        loads, measured = self._sum_over_ranks()
        for layer, load in zip(self._layers, loads, strict=True):
            layer.router.after_step(load.counts_E.to(_device_of(layer)))
        self._tell_progress()
        load_LE = [load.counts_E.numpy() for load in loads]
        resharded = False
        for planner, total in zip(self._planners, measured, strict=True):
            resharded |= planner.plan(np.stack(self._of(planner, load_LE)), total, self._optimizer)
        runtimes = [planner.runtime for planner in self._planners]
        calls = sum(total.calls for total in measured)
        report = MoEReport(
            load_LE=load_LE,
            dropped=sum(int(load.dropped) for load in loads),
            device_imbalance=sum(total.imbalance for total in measured) / calls if calls else 1.0,
            replicas=round(sum(total.replicas for total in measured) * len(self._layers) / calls) if calls else 0,
            moved_bytes=sum(int(total.moved_bytes) for total in measured),
            degree=max((runtime.degree for runtime in runtimes), default=1),
            resharded=resharded,
        )
        self.report = report if self._stages is None else self._of_all_stages(report, self._stages)
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on besides weights: plain values and tensors, the same on all ranks.

        Collective over the stages, if there are several.
        """
        planners = [planner.state_dict() for planner in self._planners]
        if self._stages is None:
            return {"step": self.step, "planners": planners}
        return {"step": self.step, "stages": _gather(planners, self._stages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; experts change owners, so load weights afterwards. Collective.

        The state of a model whose experts were not spread, or were in other groups or stages, leaves owners alone.
        """
        self.step = state["step"]
        for layer in self._layers:
            layer.router.go_on_from(self.step)
        self._tell_progress()
        for planner, saved in self._saved_planners(state):
            planner.load_state_dict(saved, self._optimizer)

    def _saved_planners(self, state: Mapping[str, Any]) -> list[tuple[StepPlanner, Mapping[str, Any]]]:
        """What `state` has for the planners here, if it is of as many stages and planners."""
        saved = state.get("planners", [])
        if self._stages is not None:
            stages = state.get("stages", [])
            saved = stages[dist.get_rank(self._stages)] if len(stages) == dist.get_world_size(self._stages) else []
        return list(zip(self._planners, saved, strict=True)) if len(saved) == len(self._planners) else []

    def _follow(self) -> None:
        self.after_step()

    def _tell_progress(self) -> None:
        if self._total_steps:
            for layer in self._layers:
                layer.router.set_progress(self.step / self._total_steps)

    def _ranks(self, group: ProcessGroup | None) -> list[ProcessGroup]:
        """Groups over which sums, one after the other, are sums over all data-parallel ranks."""
        if self._planners:
            groups = self._planners[0].runtime.store.groups
            if groups.world_size == dist.get_world_size():
                return [_world()] if groups.world_size > 1 else []
            return [g for g in (groups.experts, groups.replicate) if g is not None and dist.get_world_size(g) > 1]
        if group is None and dist.is_initialized():
            group = _world()
        return [group] if group is not None and dist.get_world_size(group) > 1 else []

    def _sum_over_ranks(self) -> tuple[list[Load], list[Measured]]:
        """Everything that ranks must agree on, in one vector: exact, as counts stay far below 2^53."""
        loads = [layer.load.take().values for layer in self._layers]
        for layer in self._layers:
            layer.take_losses()  # which would keep their graph alive
        measured = [torch.tensor(planner.measure().values, dtype=torch.float64) for planner in self._planners]
        parts = [*(load.double().cpu() for load in loads), *measured]
        total = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        if self._groups and parts:  # a pipeline stage may have none, on all of its ranks
            shared = total.to(_device_of(self._layers[0]))
            for group in self._groups:
                dist.all_reduce(shared, group=group)
            total = shared.cpu()
        pieces = torch.split(total, [len(part) for part in parts])
        sums = [Load(piece.round().long()) for piece in pieces[: len(loads)]]
        return sums, [Measured(*piece.tolist()) for piece in pieces[len(loads) :]]

    @staticmethod
    def _of_all_stages(report: MoEReport, stages: ProcessGroup) -> MoEReport:
        return MoEReport.of_stages(_gather(report, stages))

    def _of(self, planner: StepPlanner, load_LE: list[IntArray]) -> list[IntArray]:
        """The loads of the layers of a planner's store, in the store's order."""
        mine = {}
        for layer, load_E in zip(self._layers, load_LE, strict=True):
            if isinstance(layer.experts, ShardedExperts) and layer.experts.runtime is planner.runtime:
                mine[layer.experts.layer] = load_E
        return [mine[at] for at in sorted(mine)]


def runtimes_of(model: nn.Module) -> list[Runtime]:
    """The runtimes of a parallelized model's experts, one a store, in the model's order."""
    found: dict[int, Runtime] = {}
    for _, layer in moe_layers(model):
        if isinstance(layer.experts, ShardedExperts):
            found.setdefault(id(layer.experts.runtime), layer.experts.runtime)
    return list(found.values())


def _gather(value: _T, group: ProcessGroup) -> list[_T]:
    """What each rank of a group passes, in their order; collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device

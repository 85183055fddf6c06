"""Where a rank's experts live: the rows that it owns, their gradients, and the replicas that it borrows.

The experts that a rank owns, of all MoE layers that are alike, are the rows of one parameter for each of an expert's
tensors. The optimizer sees ordinary parameters, whose shapes stay when experts change owners.

Shapes: L layers, E experts of a layer, D ranks of an expert group, S experts owned by this rank over all layers, C
numbers of an expert.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsetrain.moe import ExpertSpec
from sparsetrain.moe.placement import Placement
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.collectives import Route, Transfer, sparse_all_gather, sparse_reduce_scatter
from sparsetrain.parallel.fssdp.gradients import OwnedGradients
from sparsetrain.parallel.fssdp.groups import ExpertGroups
from sparsetrain.parallel.fssdp.replicas import LocalExperts, PackedExperts, Replicas
from sparsetrain.parallel.fssdp.resharding import Resharding, check_agreement
from sparsetrain.parallel.fssdp.rows import ExpertRows
from sparsetrain.sharding import MomentsOf, Movable, Move


@dataclass
class Traffic:
    """Bytes that came to this rank over the wire."""

    gathered: int = 0
    """Weights of replicas (spAG)."""
    reduced: int = 0
    """Gradients of replicas (spRS)."""
    moved: int = 0
    """Weights, optimizer state and masks of experts that changed owners."""


class ExpertStore(Movable, ExpertRows):
    """The experts of L layers of one shape, dtype and training, each owned by one rank of an expert group.

    Memory of a rank, in bytes, with S experts owned, m replicas of a layer and C = spec.numel:

    - parameters S·C·itemsize, gradients as much, optimizer state as much for each of its tensors (two for Adam);
    - m·C·itemsize of the compute dtype for the replicas of a layer, and twice as much for gradients during the backward
      pass: one layer's are computed while those of the layer after it are on their way;
    - S·C·itemsize of the compute dtype for casts, where it is not that of the parameters.

    Arguments and errors are those of `ExpertRows`.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        layer_paths: Sequence[str],
        num_experts: int,
        owners_LE: IntArray,
        groups: ExpertGroups,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, layer_paths, num_experts, owners_LE, groups, device=device, dtype=dtype)
        self.requires_gradient_sync = True
        """Whether gradients are averaged over expert groups at the end of the backward pass; switch it off for all but
        the last micro-batch of a step, as DDP's no_sync does. (Inside a group they always come together.)"""
        self.traffic = Traffic()
        """Counts up; set it to a new one to begin again."""
        self._casts: dict[int, tuple[object, PackedExperts]] = {}
        self._gradients = OwnedGradients(self)
        self._finish_queued_for = -1
        self._reducing: tuple[int, Route, Transfer] | None = None
        _forget_casts_after_steps(self)

    # Weights to compute with

    @torch.no_grad()
    def start_gather(
        self, layer: int, placement: Placement, dtype: torch.dtype, besides: Replicas | None = None
    ) -> Replicas:
        """Begin to bring here what the placement wants here and another rank owns (spAG); collective.

        Args:
            layer: Whose experts.
            placement: Who is to hold them; its owners are the store's.
            dtype: What they travel and are computed with in; owners' weights are rounded to it on the way.
            besides: Replicas of the layer that are here or on their way, in that dtype: those of them that are wanted
                are taken over instead of being gathered again, and then they are freed.
        """
        assert np.array_equal(placement.owner_E, self.owners_LE[layer]), f"layer {layer}: a plan for other owners"
        rank, device = self.groups.rank, self.stack("w_in").device
        route = Route.of(placement, rank, None if besides is None else besides.placement)
        replicas = Replicas(self.spec, layer, placement, Route.of(placement, rank), route, dtype=dtype, device=device)
        if route.is_needed:
            packed = PackedExperts.empty(self.spec, len(route.sent), dtype, device)
            packed.fill({name: self._rows(self.stack(name), layer, route.sent) for name in self.spec.shapes})
            what = f"gathering the experts of {self.layer_paths[layer]}"
            replicas.expect(
                sparse_all_gather(packed.rows, route, self.groups.parameters, what=what, into=replicas.room)
            )
            self.traffic.gathered += replicas.bytes_received
        if besides is not None:
            replicas.take_over(besides)
        return replicas

    @torch.no_grad()
    def local_experts(
        self, layer: int, replicas: Replicas | None, dtype: torch.dtype, *, keep: bool = True
    ) -> LocalExperts:
        """The weights of a layer's experts that are here, waiting for replicas if need be.

        Args:
            layer: Which.
            replicas: Those gathered, in the same dtype.
            dtype: What to compute in. In the parameters' own dtype the owned experts are the parameters' memory.
            keep: Keep casts for the next call, until the optimizer's step. Pass False where no gradient is wanted:
                between steps people write to weights in ways that leave no trace.
        """
        owned = self.owned(layer)
        stacks: dict[str, Sequence[Tensor]]
        stacks = {name: self._rows(self.stack(name), layer, owned) for name in self.spec.shapes}
        if dtype != self.stack("w_in").dtype:
            cast = self._cast(layer, stacks, dtype, keep)
            stacks = {name: cast[name] for name in self.spec.shapes}
        return _with_replicas(owned, stacks, replicas, Replicas.weights)

    def forget_casts(self) -> None:
        """Cast anew from now on; happens by itself when weights are changed by an optimizer or in place."""
        self._casts.clear()

    def _cast(self, layer: int, stacks: dict[str, Sequence[Tensor]], dtype: torch.dtype, keep: bool) -> PackedExperts:
        version = dtype, *((stack.data_ptr(), stack._version) for stack in map(self.stack, self.spec.shapes))
        kept_version, packed = self._casts.get(layer, (None, None))
        if packed is None or kept_version != version or not keep:
            device = self.stack("w_in").device
            packed = PackedExperts.empty(self.spec, len(stacks["w_in"]), dtype, device).fill(stacks)
        if keep:
            self._casts[layer] = version, packed
        return packed

    # Gradients

    def queue_finish(self) -> None:
        """Have `finish_backward` called when the backward pass that is running is done; call it as often as you like.

        Every rank must call it in every backward pass, also one that computed with no expert.
        """
        backward_pass = torch._C._current_graph_task_id()
        assert backward_pass != -1, "called outside of a backward pass"
        if backward_pass != self._finish_queued_for:
            self._finish_queued_for = backward_pass
            Variable._execution_engine.queue_callback(self.finish_backward)

    @torch.no_grad()
    def gradients(self, layer: int, replicas: Replicas | None) -> LocalExperts:
        """Where to add the gradients of a layer's experts, in the order of `local_experts`.

        For owned experts these are rows of the parameters' `.grad`, for replicas a buffer in their own dtype.
        """
        owned = self.owned(layer)
        grads = self._gradients.open(layer)
        rows: dict[str, Sequence[Tensor]] = {name: self._rows(grad, layer, owned) for name, grad in grads.items()}
        return _with_replicas(owned, rows, replicas, Replicas.gradients)

    @torch.no_grad()
    def start_reduce(self, layer: int, replicas: Replicas | None) -> None:
        """Begin to bring a layer's gradients together, once this rank's are complete; collective.

        Those of replicas go to their owners (spRS), and what owners have then goes between the expert groups, if there
        are several. What an earlier call has brought is added up first: one layer at most is on its way to its owners.
        """
        self._add_reduced()
        if replicas is None or not replicas.route.is_needed:
            self._gradients.close(layer, synchronise=self.requires_gradient_sync)
            return
        what = f"reducing the gradients of the experts of {self.layer_paths[layer]}"
        rows_RC = replicas.take_gradients()
        transfer = sparse_reduce_scatter(rows_RC, replicas.route, self.groups.parameters, what=what)
        self.traffic.reduced += transfer.bytes_received
        self._reducing = layer, replicas.route, transfer

    @torch.no_grad()
    def finish_backward(self) -> None:
        """Make means of all gradients: `.grad` of every parameter is then what DDP would have left there.

        The mean is over all data-parallel ranks. Without `requires_gradient_sync` it is over this expert group, and
        later over the others. Experts without a token, and layers that were not run, have the gradient 0.
        """
        self._add_reduced()
        self._gradients.finish(synchronise=self.requires_gradient_sync)
        if self.requires_gradient_sync:
            self.forget_casts()  # an optimizer's step is next, and needs the memory more

    def _add_reduced(self) -> None:
        """Add up what replicas' holders have sent, in the order of their ranks; that layer is then done."""
        if self._reducing is None:
            return
        (layer, route, transfer), self._reducing = self._reducing, None
        packed = PackedExperts(self.spec, transfer.wait())
        for name, grad in self._gradients.open(layer).items():
            for row, increment in zip(self._rows(grad, layer, route.sent), packed[name], strict=True):
                row.add_(increment)
        self._gradients.close(layer, synchronise=self.requires_gradient_sync)

    # New owners

    @torch.no_grad()
    def reshard(self, owners_LE: IntArray, optimizer: Optimizer | None) -> Move:
        """Give experts new owners; weights, gradients and optimizer state move with them, bit for bit.

        Collective over all data-parallel ranks, between the end of a backward pass and the next forward pass. A row
        that an expert leaves is filled by one that arrives: parameters and state tensors stay the same tensors. Needs
        the memory of the moving rows of the largest of them twice.

        Args:
            owners_LE: int64 [L, E]; every rank owns as many as before.
            optimizer: Whose state of the parameters to move: every tensor of a parameter's shape.

        Returns:
            The move, after all listeners have heard of it.

        Raises:
            PlacementError: A rank would own more or fewer experts, or ranks were given different owners.
        """
        assert self._reducing is None, "resharding while gradients are on their way"
        assert self._gradients.are_means, "resharding during a backward pass"
        moments = _moments_in(optimizer)
        tensors = self._stacked_tensors(moments)
        check_agreement(self.groups, self.layer_paths, owners_LE, list(tensors))
        self.check_owners(owners_LE)
        resharding = Resharding(self.spec, self.layer_paths, self.groups, self.owners_LE, owners_LE)
        freed = [self._row.pop(place) for place in resharding.leaving]
        resharding.move_rows(tensors.values(), freed)
        self._row.update(zip(resharding.arriving, freed, strict=True))
        self.owners_LE = owners_LE.copy()
        self.forget_casts()
        shards = [
            self.shards_of_layer(layer, self.layer_paths[layer], moments, experts)
            for layer, experts in resharding.moved.items()
        ]
        move = Move([shard for of_layer in shards for shard in of_layer], resharding.carry)
        self.announce(move)
        self.traffic.moved += resharding.bytes_received
        return move

    def _stacked_tensors(self, moments: MomentsOf) -> dict[str, Tensor]:
        """Every tensor whose rows are experts, by a name that is the same on all ranks."""
        tensors: dict[str, Tensor] = {}
        for name in self.spec.shapes:
            stack = self.stack(name)
            tensors[name] = stack.detach()
            if stack.grad is not None:
                tensors[f"{name}.grad"] = stack.grad
            tensors |= {f"{name}.{key}": value for key, value in sorted(moments(stack).items())}
        return tensors

    def _rows(self, stack: Tensor, layer: int, experts: Sequence[int]) -> list[Tensor]:
        stack = stack.detach()
        return [stack[self._row[layer, expert]] for expert in experts]


def store_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all expert stores in a model, by the names that `named_parameters` gives them.

    They are no data-parallel wrapper's business: pass the names to DDP, or the values to `fully_shard`, to be ignored.
    """
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules()
        if isinstance(module, ExpertStore)
        for name, parameter in module.named_parameters(recurse=False)
    }


def _with_replicas(
    owned: Sequence[int],
    stacks: dict[str, Sequence[Tensor]],
    replicas: Replicas | None,
    of_replicas: Callable[[Replicas, str], list[Tensor]],
) -> LocalExperts:
    if replicas is None:
        return LocalExperts.of(owned, stacks)
    both = {name: [*stack, *of_replicas(replicas, name)] for name, stack in stacks.items()}
    return LocalExperts.of([*owned, *replicas.experts], both)


def _moments_in(optimizer: Optimizer | None) -> MomentsOf:
    def moments(parameter: Tensor) -> dict[str, Tensor]:
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        return {
            key: value
            for key, value in state.items()
            if torch.is_tensor(value) and value.dim() and value.shape == parameter.shape
        }

    return moments


def _forget_casts_after_steps(store: ExpertStore) -> None:
    """A fused optimizer changes parameters without counting up their version, so listen to every optimizer's steps."""
    reference = weakref.ref(store)

    def forget(*_: Any) -> None:
        if (store := reference()) is not None:
            store.forget_casts()

    weakref.finalize(store, register_optimizer_step_post_hook(forget).remove)

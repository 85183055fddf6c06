"""Passes of layers, each from its gate to the end of its backward pass, and how a recomputed one finds its first."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import Dispatch
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.exchange import Exchange
from sparsetrain.parallel.fssdp.replicas import LocalExperts, Replicas
from sparsetrain.parallel.fssdp.stopwatch import Stopwatch
from sparsetrain.parallel.fssdp.store import ExpertStore


@dataclass(eq=False)
class Call:
    """One pass of one layer; autograd's graph keeps it alive."""

    store: ExpertStore
    layer: int
    dtype: torch.dtype
    """What experts compute in."""
    plan: Dispatch
    exchange: Exchange
    replicas: Replicas | None
    """None where there are none, and while they are freed."""
    expert_watch: Stopwatch
    layer_watch: Stopwatch
    previous: "Call | None" = None
    """The pass before this one in the same forward pass of the model, if its replicas are to be gathered again."""

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

    def timed(self) -> AbstractContextManager[None]:
        """Measure from when rows set out until they are back, replicas included that are waited for."""
        return self.layer_watch.measure(1)

    def timed_experts(self, num_rows: int) -> AbstractContextManager[None]:
        """Measure what the experts take for so many rows."""
        return self.expert_watch.measure(num_rows)

    def free_replicas(self) -> None:
        """Let go of the replicas' weights; `gather_again` brings them back."""
        if self.replicas is not None:
            self.replicas.free()
            self.replicas = None

    def gather_again(self) -> None:
        """Have the replicas that were freed on their way; collective."""
        if self.replicas is None and self.plan.placement.num_replicas:
            self.replicas = self.store.start_gather(self.layer, self.plan.placement, self.dtype)

    def begin_backward(self) -> None:
        """The gradient of the layer's output is there; collective where replicas were freed."""
        self.store.queue_finish()
        self.gather_again()

    def end_backward(self) -> None:
        """Send the layer's gradients home, and bring the replicas of the layer before it; both run under attention."""
        self.store.start_reduce(self.layer, self.replicas)
        self.replicas = None
        previous, self.previous = self.previous, None
        if previous is not None:
            previous.gather_again()


@dataclass
class _Record:
    """What is remembered of a pass; ranks have the same ones, also where only some of them keep the graph."""

    layer: int
    digest: int
    call: weakref.ref[Call]
    is_recomputed: bool = False


class CallRecords:
    """The passes that a recomputation may ask for, from their forward pass to their backward pass or the next step."""

    def __init__(self) -> None:
        self._records: list[_Record] = []

    def add(self, call: Call) -> None:
        """Remember a pass that was computed with gradients."""
        self._records.append(_Record(call.layer, _digest(call.plan.counts_ES), weakref.ref(call)))

    def remove(self, call: Call) -> None:
        """Forget a pass, its backward pass being over."""
        self._records = [record for record in self._records if record.call() is not call]

    def clear(self) -> None:
        """Forget all: their weights are no more."""
        self._records.clear()

    def recall(self, path: str, layer: int, counts_E: list[int], gather_counts: Callable[[], IntArray]) -> Call:
        """The pass whose activations are being computed again: it has its plan, and rows go the same ways.

        Args:
            path: Of the experts, for the message.
            layer: Which.
            counts_E: This rank's rows of each expert.
            gather_counts: Gathers those of all ranks, [S, E]; asked if several passes of the layer are in flight, as
                this rank's numbers alone may not tell them apart.

        Raises:
            PlacementError: Tokens go other ways than in any pass that is known.
        """
        found = [record for record in self._records if record.layer == layer and not record.is_recomputed]
        if len(found) > 1:
            digest = _digest(gather_counts().T)
            found = [record for record in found if record.digest == digest]
        for record in reversed(found):
            call = record.call()
            if call is not None and call.exchange.counts_E == counts_E:
                record.is_recomputed = True
                call.gather_again()
                return call
        raise PlacementError(
            f"{path}: a recomputed forward pass routes tokens in another way than the first one did. Activation "
            "checkpointing needs a router that is deterministic"
        )


def _digest(counts_ES: IntArray) -> int:
    return hash(counts_ES.tobytes())

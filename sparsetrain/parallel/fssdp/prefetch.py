"""Replicas on their way before they are needed: those of the next layer travel while attention computes."""

from collections.abc import Sequence

import torch

from sparsetrain.moe.placement import Placement
from sparsetrain.parallel.fssdp.replicas import Replicas
from sparsetrain.parallel.fssdp.store import ExpertStore


class Prefetch:
    """Gathers a layer's replicas when the one before it is done, in the order of the forward pass before.

    Before there was one, the order is that of the store. Layers that are not called in that order gather their replicas
    when they are called. All ranks call their layers alike, so all gather alike.

    Args:
        store: Whose experts.
    """

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._order: Sequence[int] = range(store.num_layers)
        self._called: list[int] = []
        self.dtype = store.stack("w_in").dtype
        """What experts computed in last."""
        self._coming: dict[int, Replicas] = {}

    def begin(self, placements: Sequence[Placement]) -> None:
        """A forward pass of the model begins: start with the replicas of its first layer; collective."""
        self.drop()  # replicas for an earlier pass that did not come to their layer
        if self._called:
            self._order, self._called = self._called, []
        self._start(self._order[0], placements)

    def take(self, layer: int, placement: Placement, dtype: torch.dtype) -> Replicas | None:
        """A layer's replicas, None if it has none; collective.

        Those on their way if they are what is wanted. Where the plan has changed, they stay as far as they are wanted,
        and only what is missing is gathered.
        """
        coming = self._coming.pop(layer, None)
        if coming is not None and (coming.dtype != dtype or not placement.num_replicas):
            coming.free()
            coming = None
        if coming is not None and coming.placement is placement:
            return coming
        return self._store.start_gather(layer, placement, dtype, coming) if placement.num_replicas else None

    def end(self, layer: int, placements: Sequence[Placement], dtype: torch.dtype) -> None:
        """A layer's experts are done: start with the replicas of the next one; collective."""
        place, self.dtype = len(self._called), dtype
        self._called.append(layer)
        if place + 1 < len(self._order) and self._order[place] == layer:
            self._start(self._order[place + 1], placements)

    def drop(self) -> None:
        """Forget what is on its way: weights or owners are about to change, or have changed."""
        for replicas in self._coming.values():
            replicas.free()
        self._coming.clear()

    def _start(self, layer: int, placements: Sequence[Placement]) -> None:
        if layer in self._coming or not placements[layer].num_replicas:
            return
        self._coming[layer] = self._store.start_gather(layer, placements[layer], self.dtype)

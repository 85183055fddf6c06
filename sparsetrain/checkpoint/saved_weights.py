"""The weights of a checkpoint one by one, for a model that is not the one that was saved."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.checkpoint.agreement import on_first_rank
from sparsetrain.checkpoint.load import newest_intact_in
from sparsetrain.checkpoint.tensors import Box, GlobalTensor, load_tensors, saved_shapes
from sparsetrain.errors import CheckpointError

_KEPT = 4
"""Weights kept for being asked again: those of a feed-forward layer, of which each expert is made."""


class SavedWeights:
    """Reads whole weights of an intact checkpoint.

    Args:
        path: The checkpoint.
        shapes: Whole shape of every tensor in it.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.path = path
        self._shapes = shapes
        self._kept: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """A whole weight in float32, as the optimizer had it; not collective.

        Raises:
            CheckpointError: The checkpoint has no weight of that name.
        """
        if name not in self._kept:
            if len(self._kept) == _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = self._load(name)
        return self._kept[name]

    def _load(self, name: str) -> Tensor:
        key = f"master/{name}" if f"master/{name}" in self._shapes else f"model/{name}"
        if key not in self._shapes:
            raise CheckpointError(f"{self.path}: the checkpoint is of another model: it has no weight {name}")
        whole = torch.empty(self._shapes[key])
        load_tensors({key: GlobalTensor(whole.shape, [Box((0,) * whole.dim(), whole)])}, self.path, alone=True)
        return whole


def open_weights(path: Path, *, on_damaged: Callable[[str], None] = warnings.warn) -> SavedWeights:
    """Find and verify a checkpoint to read single weights from; collective.

    Args:
        path: A checkpoint, or a run folder: then its newest intact checkpoint.
        on_damaged: As in `latest_checkpoint`.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    checkpoint = newest_intact_in(path, on_damaged)
    return SavedWeights(checkpoint, on_first_rank(lambda: saved_shapes(checkpoint)))

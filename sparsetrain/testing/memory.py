"""How much memory tensors take inside a piece of code, on any device."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside the context and not yet freed.

    It sees what operators return, not what they use meanwhile: to look inside a custom operator, call the function that
    computes it.

    Attributes:
        peak_bytes: The most bytes alive at one time.
        largest_bytes: The largest single tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self.largest_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator and count the storages that it made."""
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in before:
                storage = leaf.untyped_storage()
                self._alive[_key(leaf)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not _is_gone(entry[0])}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

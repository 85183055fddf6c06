"""Modules that compute faster while zeros stay where masks have them."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from sparsetrain.sharding import canonical_modules


@runtime_checkable
class FollowsZeros(Protocol):
    """A module with a parameter `weight` that it need not multiply with where that is zero."""

    def zeros_follow(self, pattern: str | None) -> None:
        """From now on it is zero outside masks of a rule's pattern; None: it may be anything."""

    def masks_changed(self) -> None:
        """Its zeros have moved."""


class Followers:
    """The modules of a model that are told of their weights' zeros.

    Args:
        model: Plain, wrapped or sharded.
        patterns: Of weights that are kept zero where masks have them zero, by name.
    """

    def __init__(self, model: nn.Module, patterns: Mapping[str, str]) -> None:
        self._modules: list[FollowsZeros] = []
        for path, module in canonical_modules(model):
            name = f"{path}.weight" if path else "weight"
            if name in patterns and isinstance(module, FollowsZeros):
                module.zeros_follow(patterns[name])
                self._modules.append(module)

    def masks_changed(self) -> None:
        """Have them look again."""
        for module in self._modules:
            module.masks_changed()

    def release(self) -> None:
        """Nobody keeps the zeros any more."""
        for module in self._modules:
            module.zeros_follow(None)
        self._modules = []

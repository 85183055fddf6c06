"""Weights that change ranks during training, and how whoever keeps something per weight follows them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.sharding.shard import WeightShard


@dataclass(frozen=True)
class Move:
    """Some weights have changed ranks, with their optimizer state."""

    shards: Sequence[WeightShard]
    """The weights concerned, as they lie now."""
    carry: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Collective: takes what this rank kept for each of these weights, by name, of the shape that the weight's local
    part had here before the move; returns what it keeps now, bitwise what the other rank had. All ranks pass the same
    names and dtypes."""


Listener = Callable[[Move], None]


class Movable:
    """Mixin of modules that move weights: they announce each move on every rank of the weights' group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._listeners: OrderedDict[int, Listener] = OrderedDict()  # handles cannot refer weakly to a plain dict

    def on_move(self, listener: Listener) -> RemovableHandle:
        """Call `listener` with every move to come, in order of registration; the handle's `remove` ends it."""
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    def announce(self, move: Move) -> None:
        """Tell everybody who listens."""
        for listener in list(self._listeners.values()):
            listener(move)


def on_move(module: nn.Module, listener: Listener) -> list[RemovableHandle]:
    """Listen to the moves of every submodule that moves weights; no handles where none does."""
    return [submodule.on_move(listener) for submodule in module.modules() if isinstance(submodule, Movable)]

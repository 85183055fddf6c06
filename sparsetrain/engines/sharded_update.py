"""Engines whose ranks update a part of the weights each, and gather the others' parts before the model is next run.

What is gathered at once after a step is gathered again when masks have changed, or a checkpoint was read: so it waits
until somebody looks (weight-update sharding, arXiv 2004.13336).
"""

from abc import ABC, abstractmethod

from sparsetrain.engines.torch_engine import TorchEngine
from sparsetrain.sharding import WeightShard


class ShardedUpdateEngine(TorchEngine, ABC):
    """Knows whether somebody may have written to the shards since the weights were gathered from them."""

    _is_stale = False

    def step(self, lr: float) -> None:
        """Update this rank's part of the weights; the others' are gathered when the model is next run."""
        super().step(lr)
        self._is_stale = True

    def skip_step(self) -> None:
        """Drop the gradient without an update; masks may change all the same."""
        super().skip_step()
        self._is_stale = True

    def weight_shards(self) -> list[WeightShard]:
        """Where every weight lives; what is written there is gathered before the model is next run."""
        self._is_stale = True
        return super().weight_shards()

    def _gather_if_stale(self) -> None:
        """Call it before the model is run; collective."""
        if self._is_stale:
            self._gather()
        self._is_stale = False

    @abstractmethod
    def _gather(self) -> None:
        """Have the model multiply with what the shards of all ranks hold now; collective."""

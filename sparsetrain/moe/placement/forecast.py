"""What load to expect: the mean of the last steps."""

from collections import deque

import numpy as np
from numpy.typing import ArrayLike

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.topology import FloatArray


class LoadForecast:
    """Mean load of every expert over the last `window` steps, or over those that there were (arXiv 2502.02581: w = 5).

    Args:
        window: Steps to average over.

    Raises:
        PlacementError: The window is below 1.
    """

    def __init__(self, window: int = 5) -> None:
        if window < 1:
            raise PlacementError(f"forecast window is {window}, but must be at least 1 step")
        self.window = window
        self._loads: deque[FloatArray] = deque(maxlen=window)

    def update(self, load_LE: ArrayLike) -> None:
        """Take in the load of a finished step.

        Args:
            load_LE: [L, E], rows of each expert, summed over all ranks.

        Raises:
            PlacementError: The shape is not that of the steps before.
        """
        load = np.array(load_LE, dtype=np.float64)
        if self._loads and load.shape != self._loads[0].shape:
            raise PlacementError(f"load of shape {load.shape} follows loads of shape {self._loads[0].shape}")
        self._loads.append(load)

    @property
    def loads(self) -> list[FloatArray]:
        """float64 [L, E] of each step in the window, the oldest first."""
        return list(self._loads)

    @property
    def mean_LE(self) -> FloatArray | None:
        """float64 [L, E]; None before the first step, when nothing is known and no replica can be worth moving."""
        if not self._loads:
            return None
        mean_LE: FloatArray = np.mean(self._loads, axis=0)
        return mean_LE

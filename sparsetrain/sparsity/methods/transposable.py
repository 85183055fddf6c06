"""Transposable 2:4 with a dense tail (arXiv 2404.01847): one mask that is 2:4 along inputs and outputs alike.

y = (M ⊙ W) x and ∂L/∂x = (M ⊙ W)ᵀ ∂L/∂y, M of the 90 masks of each 4 x 4 the one that retains most |w|, chosen anew
every 40 steps; g ← g + λ(1 − M) ⊙ W; the last sixth of training is dense, and so is the trained model. Deviations: the
weight gradient is exact, not a minimum-variance estimate of two of every four.
"""

import torch
from sparsetrain_kernels.nm_linear import transposable_mask
from torch import Tensor

from sparsetrain.sparsity.methods.recipe import DecayingStraightThrough


class Transposable(DecayingStraightThrough):
    """2:4 both ways, then dense: `transposable`."""

    masks_are_transposable = True

    def is_due(self, step: int) -> bool:
        """Every few steps, until the dense tail begins."""
        return super().is_due(step) and (not self._is_dense(step) or self.timetable.changes_after(step))

    def mask(self, weight_OI: Tensor, step: int) -> Tensor:
        """Transposable, and all of the weight in the dense tail."""
        if self._is_dense(step):
            return torch.ones_like(weight_OI, dtype=torch.bool)
        return transposable_mask(weight_OI)

    def _is_dense(self, step: int) -> bool:
        return self.timetable.sparsity_after(step) == 0.0

"""Masks that only ever lose weights: gradual pruning to a schedule.

With the cubic schedule this is gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878, equation 1); with the
geometric one from 25 % to 75 % of compute it keeps to an average parameter count (arXiv 2501.12486):
M_t = top-k(|W_t| ⊙ M_(t−1)), k from the schedule. A pruned weight never regrows. Deviation: ties are broken by global
index, so that the number of weights kept is exact.
"""

from collections.abc import Sequence

from torch import Tensor

from sparsetrain.sparsity.methods.base import Method
from sparsetrain.sparsity.weights import SparseWeight


class Prune(Method):
    """Monotone masks that begin with what a phase before left, or dense."""

    zeros_in_parameter = True

    def first_masks(self, weights: Sequence[SparseWeight]) -> list[Tensor]:
        """Those that are there, pruned at once if the schedule starts with the phase."""
        return self.next_masks(weights, 0) if self.is_due(0) else [weight.bits.bool() for weight in weights]

    def is_due(self, step: int) -> bool:
        """At the schedule's updates."""
        return self.timetable.changes_after(step)

    def next_masks(self, weights: Sequence[SparseWeight], step: int) -> list[Tensor]:
        """The best of the weights that are left."""
        return self.choose(weights, step, within=True)

"""One mask for the whole phase, chosen at its start: SPDF's sparse pre-training (arXiv 2303.10464).

W ← M ⊙ W before the first step and ever after, M uniformly random at sparsity s. The phase after it is dense: give
it no rules, and zeroed weights start at 0 and learn. Deviation: the mask may also be chosen by magnitude.
"""

from collections.abc import Sequence

from torch import Tensor

from sparsetrain.sparsity.methods.base import Method
from sparsetrain.sparsity.weights import SparseWeight


class Static(Method):
    """A mask that never changes, chosen among all weights whatever a phase before left."""

    zeros_in_parameter = True

    def first_masks(self, weights: Sequence[SparseWeight]) -> list[Tensor]:
        """The mask."""
        return self.choose(weights, 0, within=False)

    def is_due(self, step: int) -> bool:
        """Never."""
        return False

    def next_masks(self, weights: Sequence[SparseWeight], step: int) -> list[Tensor]:
        """The mask again."""
        return [weight.bits.bool() for weight in weights]

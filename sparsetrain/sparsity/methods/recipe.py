"""n:m recipes: weights stay dense and learn; the forward pass sees n of every m of them, the largest.

Plain straight-through estimation, `ste`: y = (M ⊙ W) x, and ∂L/∂W is taken to be ∂L/∂(M ⊙ W), for all of W. M follows
from W after every step, or every few. Ties go to the lower index. A subclass changes what its paper changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sparsetrain_kernels.nm_linear import NMPattern, magnitude_mask
from torch import Tensor

from sparsetrain.errors import TrainingError
from sparsetrain.sparsity.gathering import whole_of
from sparsetrain.sparsity.methods.base import Method
from sparsetrain.sparsity.weights import SparseWeight


@dataclass(frozen=True)
class ProductDensities:
    """Share of the multiplications of a dense layer that are not by zero, in each of a training step's products."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def mean(self) -> float:
        """Share over all three, which are of one size."""
        return (self.forward + self.input_gradient + self.weight_gradient) / 3


class StraightThrough(Method):
    """Masks of the n largest of m that the forward pass alone sees, with dense gradients: `ste`."""

    zeros_in_parameter = False
    gradient_flows_freely = True
    """True: unseen weights get their whole gradient. False: that of the product, as small as their factor."""
    masks_are_transposable = False
    """Whether masks are 2:4 along outputs too."""

    def first_masks(self, weights: Sequence[SparseWeight]) -> list[Tensor]:
        """Of the weights as they are."""
        return self.next_masks(weights, 0)

    def is_due(self, step: int) -> bool:
        """Every `refresh_every_steps`, and when the pattern changes."""
        return step % self.rule.refreshed_every == 0 or self.timetable.changes_after(step)

    def next_masks(self, weights: Sequence[SparseWeight], step: int) -> list[Tensor]:
        """Of the weights that the optimizer holds; collective where they are sharded."""
        return [self._local_mask(weight, step) for weight in weights]

    def mask(self, weight_OI: Tensor, step: int) -> Tensor:
        """The mask of a whole weight, bool [O, I], once `step` steps are done."""
        pattern = self.pattern(step)
        return magnitude_mask(weight_OI, pattern).repeat_interleave(pattern.vector, 0)

    def pattern(self, step: int) -> NMPattern:
        """What holds once `step` steps are done."""
        assert self.rule.groups is not None, "the config asks recipes for n:m"
        return NMPattern(self.rule.groups.n, self.rule.groups.m, self.rule.groups.vector)

    def input_gradient_mask(self, weight_OI: Tensor) -> Tensor | None:
        """The mask of ∂L/∂x = (M ⊙ W)ᵀ ∂L/∂y, bool [O, I]; None: that of the forward pass."""
        return None

    def unseen_factor(self, step: int) -> float:
        """d in W ⊙ (M + (1 − M) d), once `step` steps are done."""
        return 0.0

    def product_densities(self, density: float) -> ProductDensities:
        """What a layer multiplies with when `density` of it is seen: a dense weight gradient, and sparse weights."""
        return ProductDensities(density, density, 1.0)

    def add_to_gradients(self, weights: Sequence[SparseWeight]) -> None:
        """Change the gradient of a step, summed over ranks and micro-batches, before it is clipped."""

    def _local_mask(self, weight: SparseWeight, step: int) -> Tensor:
        whole = whole_of(weight.shard, weight.shard.local_master())
        if not torch.isfinite(whole).all():
            raise TrainingError(f"{weight.shard.name} is not finite after step {step}: lower optimizer.lr")
        return weight.shard.cut(self.mask(whole, step))


class DecayingStraightThrough(StraightThrough):
    """SR-STE: g ← g + λ(1 − M) ⊙ W (arXiv 2102.04010, equation 9), λ = 2e-4: `sr_ste`.

    Added once a step to the summed gradient, before clipping: it is part of what the optimizer sees.
    """

    @torch.no_grad()
    def add_to_gradients(self, weights: Sequence[SparseWeight]) -> None:
        """Pull unseen weights towards zero."""
        for weight in weights:
            grad = weight.shard.local_grad()
            if grad is not None:
                unseen = torch.where(weight.bits.bool(), 0, weight.shard.local_master())
                grad.add_(unseen.to(grad.dtype), alpha=self.rule.decayed_by)


class BidirectionalPruning(StraightThrough):
    """n:m weights in the forward and, along the outputs, in the input-gradient product (arXiv 2309.13015): `bdwp`.

    y = (M ⊙ W) x with groups of m inputs; ∂L/∂x = (M′ ⊙ W)ᵀ ∂L/∂y with groups of m outputs, so that both products add
    up n of every m terms; the weight gradient is dense.
    """

    def input_gradient_mask(self, weight_OI: Tensor) -> Tensor:
        """The n largest of every m outputs."""
        return magnitude_mask(weight_OI.T.contiguous(), self.pattern(0)).T.contiguous()

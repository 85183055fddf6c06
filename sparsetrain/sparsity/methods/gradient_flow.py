"""Progressive gradient flow (arXiv 2402.04744): weights that a pattern does not keep fade out, instead of vanishing.

MdGf, mask decay: y = W ⊙ (M + (1 − M) d) x, d = max(0, 1 − βt) or e^(−βt), and the gradient of W is that of this
product: as d falls, less and less flows to unseen weights. SdGf, structure decay: n falls from m − 1 over m/2, m/4, ...
to the pattern's. t counts steps. Deviations: β follows from `decay_end`, the fraction of the phase from which the
pattern holds: linear decay is 0 there; exponential decay has come to 1 % and is cut to 0, so that a trained model
is n:m.
"""

import math

from sparsetrain_kernels.nm_linear import NMPattern

from sparsetrain.sparsity.methods.recipe import ProductDensities, StraightThrough

_LEAST_FACTOR = 0.01
"""Of exponential decay, where it is cut."""


class _GradientFlow(StraightThrough):
    gradient_flows_freely = False

    def product_densities(self, density: float) -> ProductDensities:
        """All three products skip what is unseen."""
        return ProductDensities(density, density, density)


class MaskDecay(_GradientFlow):
    """Unseen weights take part with a factor that falls to 0: `mdgf`."""

    def unseen_factor(self, step: int) -> float:
        """d, from 1 at the first step to 0 where the timetable begins."""
        (end,) = self.timetable.steps
        if step >= end:
            return 0.0
        if self.rule.decay == "exponential":
            return math.exp(math.log(_LEAST_FACTOR) * step / end)
        return 1 - step / end


class StructureDecay(_GradientFlow):
    """n falls in stages: `sdgf`."""

    def pattern(self, step: int) -> NMPattern:
        """The stage's n, of the pattern's m."""
        assert self.rule.groups is not None, "the config asks recipes for n:m"
        m = self.rule.groups.m
        return NMPattern(round(m * (1 - self.timetable.sparsity_after(step))), m, self.rule.groups.vector)

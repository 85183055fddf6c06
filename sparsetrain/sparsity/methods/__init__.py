"""Methods: how the weights of one rule become sparse and stay so. A file each; `METHODS` is what a config may name."""

from sparsetrain.sparsity.methods.base import Method
from sparsetrain.sparsity.methods.gradient_flow import MaskDecay, StructureDecay
from sparsetrain.sparsity.methods.prune import Prune
from sparsetrain.sparsity.methods.recipe import (
    BidirectionalPruning,
    DecayingStraightThrough,
    ProductDensities,
    StraightThrough,
)
from sparsetrain.sparsity.methods.static import Static
from sparsetrain.sparsity.methods.transposable import Transposable

METHODS: dict[str, type[Method]] = {
    "static": Static,
    "prune": Prune,
    "ste": StraightThrough,
    "sr_ste": DecayingStraightThrough,
    "mdgf": MaskDecay,
    "sdgf": StructureDecay,
    "bdwp": BidirectionalPruning,
    "transposable": Transposable,
}

__all__ = ["METHODS", "Method", "ProductDensities", "Prune", "Static", "StraightThrough"]

"""Methods: how the weights of one rule become sparse and stay so. A file each; `METHODS` is what a config may name."""

from sparsetrain.sparsity.methods.base import Method
from sparsetrain.sparsity.methods.prune import Prune
from sparsetrain.sparsity.methods.static import Static

METHODS: dict[str, type[Method]] = {"static": Static, "prune": Prune}

__all__ = ["METHODS", "Method", "Prune", "Static"]

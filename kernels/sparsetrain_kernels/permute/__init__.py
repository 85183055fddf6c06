"""Tokens to rows sorted by expert, and back."""

from sparsetrain_kernels.permute.op import permute, unpermute
from sparsetrain_kernels.permute.order import sort_by_expert

__all__ = ["permute", "sort_by_expert", "unpermute"]

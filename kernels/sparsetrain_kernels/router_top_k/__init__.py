"""The choice of a softmax router."""

from sparsetrain_kernels.router_top_k.op import router_top_k

__all__ = ["router_top_k"]

"""Routers: from a token's activation to its experts."""

from sparsetrain.moe.routers.base import Router
from sparsetrain.moe.routers.build import build_router

__all__ = ["Router", "build_router"]

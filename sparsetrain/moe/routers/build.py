"""From a router's name or config to the router."""

from collections.abc import Callable
from typing import Any

from sparsetrain.config.moe import RouterConfig, SoftmaxTopK
from sparsetrain.config.navigate import kinds_of, nearest, sections_in
from sparsetrain.errors import MoeError
from sparsetrain.moe.routers.base import Router
from sparsetrain.moe.routers.softmax_topk import SoftmaxTopKRouter

_ROUTERS: dict[type, Callable[..., Router]] = {
    SoftmaxTopK: SoftmaxTopKRouter,
}


def build_router(router: str | RouterConfig, dim: int, num_experts: int, top_k: int, *, layer: int = 0) -> Router:
    """Make a router.

    Args:
        router: Its name (with default settings), or its config.
        dim: D.
        num_experts: E.
        top_k: Experts that a token uses.
        layer: Which of a model's MoE layers it belongs to, from 0; hash and replay do something else in each.

    Raises:
        MoeError: No router has that name, or top_k is not between 1 and num_experts.
        ConfigError: A router is named that has no default settings.
    """
    config = _config_of(router) if isinstance(router, str) else router
    return _ROUTERS[type(config)](config, dim, num_experts, top_k)


def _config_of(name: str) -> Any:
    known = kinds_of(sections_in(RouterConfig))
    if name not in known:
        near = nearest(name, known)
        raise MoeError(
            f"router = {name}: expected one of {', '.join(known)}" + (f"; did you mean {near}?" if near else "")
        )
    return known[name](kind=name)

"""From a router's name or config to the router."""

from sparsetrain.config.moe import (
    DenseToSparse,
    ExpertChoice,
    Hash,
    ReluGate,
    Replay,
    RouterConfig,
    SigmoidTopK,
    SoftmaxTopK,
)
from sparsetrain.config.navigate import kinds_of, nearest, sections_in
from sparsetrain.errors import MoeError
from sparsetrain.moe.routers.base import Router
from sparsetrain.moe.routers.dense_to_sparse import DenseToSparseRouter
from sparsetrain.moe.routers.expert_choice import ExpertChoiceRouter
from sparsetrain.moe.routers.hash import HashRouter
from sparsetrain.moe.routers.relu import ReluRouter
from sparsetrain.moe.routers.replay import ReplayRouter
from sparsetrain.moe.routers.sigmoid_topk import SigmoidTopKRouter
from sparsetrain.moe.routers.softmax_topk import SoftmaxTopKRouter


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
        PlacementError: The load trace of replay is missing, or of another model.
    """
    match _config_of(router) if isinstance(router, str) else router:
        case SoftmaxTopK() as config:
            return SoftmaxTopKRouter(config, dim, num_experts, top_k)
        case SigmoidTopK() as config:
            return SigmoidTopKRouter(config, dim, num_experts, top_k)
        case ExpertChoice():
            return ExpertChoiceRouter(dim, num_experts, top_k)
        case Hash() as config:
            return HashRouter(config, num_experts, top_k, layer)
        case DenseToSparse() as config:
            return DenseToSparseRouter(config, dim, num_experts, top_k)
        case ReluGate() as config:
            return ReluRouter(config, dim, num_experts, top_k)
        case Replay() as config:
            return ReplayRouter(config, dim, num_experts, top_k, layer)
        case other:
            raise MoeError(f"router = {other}: expected a name, or a config of sparsetrain.config.moe")


def _config_of(name: str) -> RouterConfig:
    known = kinds_of(sections_in(RouterConfig))
    if name not in known:
        near = nearest(name, known)
        raise MoeError(
            f"router = {name}: expected one of {', '.join(known)}" + (f"; did you mean {near}?" if near else "")
        )
    config: RouterConfig = known[name](kind=name)  # type: ignore[assignment]
    return config

"""The mixture-of-experts layer: router, experts, combination. It knows one device; parallelism replaces its `experts`.

Shapes: T tokens, D model dim, E experts.
"""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sparsetrain.config.moe import RouterConfig
from sparsetrain.errors import MoeError
from sparsetrain.moe.capacity import Overflow, limit_rows
from sparsetrain.moe.experts import Experts, ExpertSpec
from sparsetrain.moe.feed_forward import Activation, FeedForward
from sparsetrain.moe.load import LoadMeter
from sparsetrain.moe.losses import LossWeights, Scope
from sparsetrain.moe.routers import Router, build_router
from sparsetrain.moe.routing import Routing
from sparsetrain.moe.upcycle import ALIKE, Diversity, upcycle_
from sparsetrain.sharding import canonical_modules


class MoELayer(nn.Module):
    """y(x) = Σ_e w_e(x) · expert_e(x) over the few experts that a router gives a token, + shared(x).

    Nothing is dropped unless a `capacity_factor` is given. The router computes in float32 under autocast.

    Args:
        dim: Size of the activations, D.
        ffn_dim: Size inside an expert.
        num_experts: E.
        top_k: Experts that a token uses; a `Router` of one's own knows it already.
        activation: swiglu or gelu, of experts and shared experts.
        router: A name, a config (`sparsetrain.config.moe`), or a `Router` of one's own.
        shared_experts: How many experts' worth of feed-forward network every token goes through besides.
        capacity_factor: Rows an expert takes at most in one call, in units of the mean; None for no limit.
        overflow: What to do with the rest: see `sparsetrain.moe.capacity`.
        aux_loss: Weight of the load-balance loss. `auxiliary_loss(model)` collects it.
        z_loss: Weight of the router's z-loss.
        aux_scope: Balance the tokens of a call, or those of each sequence (the last dimension but one of x).
        bias: Whether experts and shared experts have biases.
        layer: Which of the model's MoE layers this is, from 0; read by the routers hash and replay.

    Raises:
        MoeError: Sizes, factors or weights that cannot be; an unknown router; losses that the router has not.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: Activation = "swiglu",
        router: str | RouterConfig | Router = "softmax_topk",
        shared_experts: int = 0,
        capacity_factor: float | None = None,
        overflow: Overflow = "drop",
        aux_loss: float = 0.0,
        z_loss: float = 0.0,
        aux_scope: Scope = "micro_batch",
        bias: bool = False,
        layer: int = 0,
    ) -> None:
        super().__init__()
        _check(num_experts, shared_experts, capacity_factor, overflow)
        spec = ExpertSpec(dim, ffn_dim, activation, bias)
        if not isinstance(router, Router):
            router = build_router(router, dim, num_experts, top_k, layer=layer)
        if router.num_experts != num_experts:
            raise MoeError(f"num_experts = {num_experts}: the router is one for {router.num_experts} experts")
        self.capacity_factor, self.overflow = capacity_factor, overflow
        self.loss_weights = LossWeights(aux_loss, z_loss, aux_scope)
        self.loss_weights.check(router)
        self.router = router
        self.experts: nn.Module = Experts(spec, num_experts)
        self.shared = FeedForward(dim, shared_experts * ffn_dim, activation, bias) if shared_experts else None
        self.load = LoadMeter(num_experts)
        """Counts the tokens of forward passes with gradients, each once; `take` it after every optimizer step."""
        self._losses: list[tuple[Tensor, int]] = []
        self._was_recorded = False

    @classmethod
    def from_dense(
        cls, ffn: nn.Module, num_experts: int, top_k: int = 2, *, diversity: Diversity = ALIKE, **options: Any
    ) -> Self:
        """A layer whose every expert starts as a dense feed-forward network; see `sparsetrain.moe.upcycle`.

        Args:
            ffn: With linear layers gate, up and down (becomes swiglu), or up and down (becomes gelu, in the tanh form).
            num_experts: E.
            top_k: Experts that a token uses.
            diversity: How the experts are made to differ.
            options: What else the constructor takes, besides sizes, activation and bias.

        Raises:
            MoeError: The network has not such layers.
        """
        weights = {f"ffn.{name}": parameter for name, parameter in ffn.named_parameters()}
        has_gate, has_bias = "ffn.gate.weight" in weights, "ffn.up.bias" in weights
        parts = ["gate", "up", "down"] if has_gate else ["up", "down"]
        if set(weights) != {f"ffn.{part}.{kind}" for part in parts for kind in ["weight", "bias"][: 1 + has_bias]}:
            raise MoeError(
                f"{type(ffn).__name__} cannot become experts: expected weights gate, up and down, or up and down, all "
                f"with biases or none, and it has {', '.join(name.removeprefix('ffn.') for name in weights) or 'none'}"
            )
        up = weights["ffn.up.weight"]
        activation: Activation = "swiglu" if has_gate else "gelu"
        ffn_dim, dim = up.shape
        layer = cls(dim, ffn_dim, num_experts, top_k, activation=activation, bias=has_bias, **options)
        layer = layer.to(up.device, up.dtype)
        upcycle_(nn.ModuleDict({"moe": layer}), weights.__getitem__, diversity)
        return layer

    # A break between graphs: how many rows an expert has is known at run time only.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., D]; the last dimension but one is that of a sequence's tokens.
            token_ids: int64 of the leading dimensions of x; needed by the router hash alone.

        Returns:
            [..., D], in the autocast dtype or that of x.

        Raises:
            MoeError: The router needs token ids and has none; or the layer is recomputed by a reentrant checkpoint.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        seq_len = x.shape[-2] if x.dim() > 1 else 1
        wanted = self.router(x_TD, seq_len=seq_len, token_ids_T=None if token_ids is None else token_ids.reshape(-1))
        routing = wanted
        if self.capacity_factor is not None:
            routing = limit_rows(wanted, self.capacity_factor, self.overflow)
        self._record(wanted, routing.dropped, seq_len)
        y_TD: Tensor = self.experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.reshape(x.shape)

    def take_losses(self) -> list[tuple[Tensor, int]]:
        """Of each forward pass since they were last taken: the weighted losses, summed over its tokens, and how many.

        `MoEController` throws away what nobody has taken by the end of a step.
        """
        losses, self._losses = self._losses, []
        return losses

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: a loss belongs to the graph that it is part of."""
        return {**self.__dict__, "_losses": []}

    def _record(self, wanted: Routing, dropped: Tensor, seq_len: int) -> None:
        """Count the load and keep the losses of a forward pass that is for training, once if it is recomputed."""
        if not torch.is_grad_enabled():
            return
        # In a recomputation too: activation checkpointing wants to see the same operations again.
        loss = self.loss_weights.total(wanted, seq_len, self.router)
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            self._was_recorded = True
            self.load.add(wanted, dropped)
            if loss is not None:
                self._losses.append((loss, wanted.num_tokens))
        elif not self._was_recorded:
            raise MoeError(
                "a MoELayer inside torch.utils.checkpoint(use_reentrant=True) runs without gradients first, so that "
                "neither its load nor its losses can be told from an evaluation's; pass use_reentrant=False"
            )


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Every MoELayer of a model with its path, without what wrappers put into it; a shared one once."""
    found: dict[int, tuple[str, MoELayer]] = {}
    for path, module in canonical_modules(model):
        if isinstance(module, MoELayer):
            found.setdefault(id(module), (path, module))
    return list(found.values())


def auxiliary_loss(model: nn.Module, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """The balance, z- and router losses of every MoELayer, weighted; add it to the loss.

    Of all forward passes with gradients since they were last taken: a layer that is called several times adds as much
    as several layers would. They are taken: called again before the next forward pass, it returns 0.

    Args:
        model: Plain or wrapped.
        reduction: mean: per token, for a loss that is a mean over tokens. sum: over tokens, for a loss that is a sum,
            so that the two can be divided by the tokens of all micro-batches and ranks together.

    Returns:
        0-d, with gradient; 0 where nothing was computed, such as under no_grad.
    """
    taken = [loss for _, layer in moe_layers(model) for loss in layer.take_losses()]
    losses = [loss if reduction == "sum" else loss / max(num_tokens, 1) for loss, num_tokens in taken]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _check(num_experts: int, shared_experts: int, capacity_factor: float | None, overflow: str) -> None:
    if num_experts < 1:
        raise MoeError(f"num_experts = {num_experts}: must be at least 1")
    if shared_experts < 0:
        raise MoeError(f"shared_experts = {shared_experts}: must not be negative")
    if capacity_factor is not None and not capacity_factor > 0:
        raise MoeError(f"capacity_factor = {capacity_factor}: must be above 0; None drops nothing")
    if overflow not in ("drop", "pad"):
        raise MoeError(f"overflow = {overflow}: expected drop or pad")
    if overflow == "pad" and capacity_factor is None:
        raise MoeError("overflow = pad: nothing overflows without a capacity_factor; set one")

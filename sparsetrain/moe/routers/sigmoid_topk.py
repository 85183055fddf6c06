"""Sigmoid scores, and a bias that evens out the load without a loss."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from sparsetrain.config.moe import SigmoidTopK
from sparsetrain.moe.routers.base import LearnedRouter
from sparsetrain.moe.routing import Routing
from sparsetrain.sharding import weight_shards

_TINY = 1e-20
"""Keeps a token whose scores all underflow from dividing by 0."""


class SigmoidTopKRouter(LearnedRouter):
    """s = sigmoid(W x); a token uses the top_k experts of the largest s + bias (arXiv 2408.15664; DeepSeek-V3).

    The weights are s without the bias, divided by their sum with `renormalise`, times `scale`. After each step the bias
    of an expert moves by bias_update_rate · sign(mean load − its load). For losses, scores are s/Σs. In a model that is
    cast to half precision the bias stays float32: there 0.5 + 0.001 is 0.5.
    """

    def __init__(self, config: SigmoidTopK, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim, num_experts, top_k)
        self.renormalise, self.scale, self.bias_update_rate = config.renormalise, config.scale, config.bias_update_rate
        self.weight_sum = config.scale if config.renormalise else None
        # A parameter, though without gradient: so that it is initialised, sharded and saved like any weight.
        self.bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`."""
        logits_TE = self.logits(x_TD)
        sigmoid_TE = logits_TE.sigmoid()
        expert_TK = (sigmoid_TE.detach() + self.bias).topk(self.top_k, dim=-1).indices
        weight_TK = sigmoid_TE.gather(1, expert_TK)
        if self.renormalise:
            weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + _TINY)
        scores_TE = sigmoid_TE / (sigmoid_TE.sum(dim=-1, keepdim=True) + _TINY)
        return Routing.of_choices(
            expert_TK, weight_TK * self.scale, self.num_experts, scores_TE=scores_TE, logits_TE=logits_TE
        )

    @torch.no_grad()
    def after_step(self, counts_E: Tensor) -> None:
        """Move the bias towards an even load; a step without tokens moves nothing."""
        load_E = counts_E.double()
        move_E = self.bias_update_rate * (load_E.mean() - load_E).sign()
        for shard in weight_shards(self):
            if shard.name == "bias":
                local = shard.local_weight()
                local.add_(shard.cut(move_E).to(local))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and the like go through."""
        exact_E = self.bias.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype.itemsize < 4:
            self.bias.data = exact_E.to(self.bias.device)
        return self

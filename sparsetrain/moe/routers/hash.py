"""Experts by token id."""

import torch
from torch import Tensor

from sparsetrain.config.moe import Hash
from sparsetrain.errors import MoeError
from sparsetrain.moe.routers.base import Router
from sparsetrain.moe.routing import Routing
from sparsetrain.sparsity.keys import random_keys


class HashRouter(Router):
    """A token's experts are a random function of its id alone (random hash of Hash Layers, arXiv 2106.04426).

    Each of its top_k experts, no two the same, has weight 1/top_k. The function is computed, not stored: the same in
    every process, and another one in each layer. Nothing is learned, and frequent tokens load their experts.
    """

    losses = frozenset()

    def __init__(self, config: Hash, num_experts: int, top_k: int, layer: int) -> None:
        super().__init__(num_experts, top_k)
        self.seed, self.layer = config.seed, layer
        self.weight_sum = 1.0

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`.

        Raises:
            MoeError: Without token ids, or not as many as tokens.
        """
        if token_ids_T is None or len(token_ids_T) != len(x_TD):
            given = "none" if token_ids_T is None else str(len(token_ids_T))
            raise MoeError(f"router = hash needs the ids of {len(x_TD)} tokens and got {given}: layer(x, token_ids)")
        experts_E = torch.arange(self.num_experts, device=token_ids_T.device)
        place_TE = token_ids_T.long().unsqueeze(1) * self.num_experts + experts_E
        keys_TE = random_keys(self.seed, f"moe layer {self.layer}", place_TE)
        expert_TK = keys_TE.topk(self.top_k, dim=-1).indices
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weight_TK = torch.full(expert_TK.shape, 1 / self.top_k, dtype=dtype, device=x_TD.device)
        return Routing.of_choices(expert_TK, weight_TK, self.num_experts)

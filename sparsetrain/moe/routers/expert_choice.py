"""Experts that choose their tokens."""

from math import ceil

import torch
from torch import Tensor

from sparsetrain.moe.routers.base import LearnedRouter
from sparsetrain.moe.routing import Routing


class ExpertChoiceRouter(LearnedRouter):
    """s = softmax(W x); of each sequence of n tokens an expert takes the ⌈n·top_k/E⌉ of the largest s for it.

    The weights are s (arXiv 2202.09368, eq. 1 and 2). The load is even by construction; a token may have no expert, or
    all. Choosing by sequence makes the result independent of how a batch is cut into micro-batches and over ranks. But
    whether a token is chosen depends on the tokens after it: a causal language model sees a little of the future.
    """

    losses = frozenset({"z_loss"})

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        # S sequences of N tokens, of which an expert takes C.
        scores_SNE = scores_TE.detach().view(-1, max(seq_len or len(x_TD), 1), self.num_experts)
        num_taken = ceil(scores_SNE.shape[1] * self.top_k / self.num_experts)
        taken_SCE = scores_SNE.topk(num_taken, dim=1).indices
        chosen_SNE = torch.zeros_like(scores_SNE, dtype=torch.bool).scatter_(1, taken_SCE, True)
        return Routing.of_mask(chosen_SNE.view_as(scores_TE), scores_TE, logits_TE=logits_TE)

"""Losses that keep the experts of a layer evenly loaded and its router's logits small.

All are sums over tokens: divided by the number of tokens of all micro-batches and ranks, their sum is the mean,
however the tokens were cut.

Shapes: T tokens, E experts, S sequences or other groups of tokens, R rows.
"""

from typing import Literal

import torch
from torch import Tensor

from sparsetrain.moe.routing import Routing

Scope = Literal["micro_batch", "sequence"]


def balance_loss(routing: Routing, group_len: int) -> Tensor:
    """Σ over groups of n · E · Σ_e f_e · P_e (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_e: share of the group's rows that go to expert e; P_e: mean of its n tokens' scores for e. n where the load is
    even. The gradient flows through P.

    Args:
        routing: With scores, before any rows are dropped.
        group_len: n, of which T is a multiple.

    Returns:
        0-d, in the dtype of the scores.
    """
    assert routing.scores_TE is not None
    num_experts, group_len = routing.num_experts, max(group_len, 1)
    scores_SNE = routing.scores_TE.view(-1, group_len, num_experts)
    cell_R = routing.token_R // group_len * num_experts + routing.expert_R
    counts = torch.zeros(len(scores_SNE) * num_experts, dtype=scores_SNE.dtype, device=cell_R.device)
    counts_SE = counts.scatter_add_(0, cell_R, torch.ones_like(cell_R, dtype=counts.dtype)).view(-1, num_experts)
    share_SE = counts_SE / counts_SE.sum(dim=1, keepdim=True).clamp(min=1)
    return num_experts * (share_SE * scores_SNE.sum(dim=1)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Σ over tokens of (log Σ_e exp logit_e)² (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        0-d, in the dtype of the logits.
    """
    assert routing.logits_TE is not None
    return routing.logits_TE.logsumexp(dim=-1).square().sum()

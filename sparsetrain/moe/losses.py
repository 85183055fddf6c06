"""Losses that keep the experts of a layer evenly loaded and its router's logits small.

All are sums over tokens: divided by the number of tokens of all micro-batches and ranks, their sum is the mean,
however the tokens were cut.

Shapes: T tokens, E experts, S sequences or other groups of tokens, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.errors import MoeError
from sparsetrain.moe.routers import Router
from sparsetrain.moe.routing import Routing

Scope = Literal["micro_batch", "sequence"]


@dataclass(frozen=True)
class LossWeights:
    """How much the losses of a layer weigh.

    Raises:
        MoeError: A weight is negative, or the scope unknown.
    """

    aux_loss: float = 0.0
    """Of the balance loss."""
    z_loss: float = 0.0
    aux_scope: Scope = "micro_batch"
    """Balance the tokens of a call, or of each sequence."""
    add_up: Callable[[Tensor], object] | None = None
    """Adds counts up, in place, over the ranks that share the tokens of one call; None where a rank has them all."""

    def __post_init__(self) -> None:
        for name in ("aux_loss", "z_loss"):
            if not getattr(self, name) >= 0:
                raise MoeError(f"{name} = {getattr(self, name)}: a weight must not be negative")
        if self.aux_scope not in ("micro_batch", "sequence"):
            raise MoeError(f"aux_scope = {self.aux_scope}: expected micro_batch or sequence")

    def check(self, router: Router) -> None:
        """Make sure that a router has what is weighted.

        Raises:
            MoeError: It has not.
        """
        for name in ("aux_loss", "z_loss"):
            if getattr(self, name) and name not in router.losses:
                raise MoeError(f"{name} = {getattr(self, name)}: {type(router).__name__} has no such loss; set it to 0")

    def total(self, routing: Routing, seq_len: int, router: Router) -> Tensor | None:
        """The weighted losses and the router's own penalty, summed over tokens; None where there is none."""
        losses = []
        if self.aux_loss:
            group_len = seq_len if self.aux_scope == "sequence" else routing.num_tokens
            losses.append(self.aux_loss * balance_loss(routing, group_len, self.add_up))
        if self.z_loss:
            losses.append(self.z_loss * z_loss(routing))
        if (penalty := router.penalty(routing, seq_len)) is not None:
            losses.append(penalty)
        return torch.stack(losses).sum() if losses else None


def balance_loss(routing: Routing, group_len: int, add_up: Callable[[Tensor], object] | None = None) -> Tensor:
    """Σ over groups of n · E · Σ_e f_e · P_e (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_e: share of the group's rows that go to expert e; P_e: mean of its n tokens' scores for e. n where the load is
    even; `load_balancing_loss_func` of transformers gives top_k times as much. The gradient flows through P.

    Args:
        routing: With scores, before any rows are dropped.
        group_len: n, of which T is a multiple.
        add_up: Adds a tensor up, in place, over ranks that have tokens of the same groups: their losses then add up to
            that of all tokens together. None: all are here.

    Returns:
        0-d, in the dtype of the scores.

    Raises:
        MoeError: The routing has no scores.
    """
    if routing.scores_TE is None:
        raise MoeError("aux_loss: the router gives no scores_TE to balance; set aux_loss = 0")
    num_experts, group_len = routing.num_experts, max(group_len, 1)
    scores_SNE = routing.scores_TE.view(-1, group_len, num_experts)
    cell_R = routing.token_R // group_len * num_experts + routing.expert_R
    counts = torch.zeros(len(scores_SNE) * num_experts, dtype=scores_SNE.dtype, device=cell_R.device)
    counts_SE = counts.scatter_add_(0, cell_R, torch.ones_like(cell_R, dtype=counts.dtype)).view(-1, num_experts)
    if add_up is not None:
        add_up(counts_SE)
    share_SE = counts_SE / counts_SE.sum(dim=1, keepdim=True).clamp(min=1)
    return num_experts * (share_SE * scores_SNE.sum(dim=1)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Σ over tokens of (log Σ_e exp logit_e)² (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        0-d, in the dtype of the logits.

    Raises:
        MoeError: The routing has no logits.
    """
    if routing.logits_TE is None:
        raise MoeError("z_loss: the router gives no logits_TE; set z_loss = 0")
    return routing.logits_TE.logsumexp(dim=-1).square().sum()

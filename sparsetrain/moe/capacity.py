"""At most so many rows for each expert.

Shapes: T tokens, E experts, R rows before, C rows an expert takes at most.
"""

from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.moe.routing import Routing

Overflow = Literal["drop", "pad"]


def limit_rows(routing: Routing, capacity_factor: float, overflow: Overflow) -> Routing:
    """Leave out the rows that exceed an expert's capacity C = ⌈capacity_factor · R / E⌉ (GShard, arXiv 2006.16668).

    Of an expert's rows the earliest tokens stay, so that whether a token is served does not depend on those after it.
    Other weights of a token whose row is dropped stay as they are: what its expert would have added is missing.

    Args:
        routing: Without limit.
        capacity_factor: Rows an expert takes at most, in units of the mean.
        overflow: drop: nothing more. pad: fill every expert up to C with rows of the last token and weight 0, so that
            shapes depend on R alone.

    Returns:
        The routing with what is left; `dropped` counts what is not. `scores_TE` and `logits_TE` stay.
    """
    num_rows, num_experts = len(routing.token_R), routing.num_experts
    capacity = ceil(capacity_factor * num_rows / num_experts)
    kept_E = routing.counts_E.clamp(max=capacity)
    dropped = routing.dropped + num_rows - kept_E.sum()
    first_E = routing.counts_E.cumsum(0) - routing.counts_E
    if overflow == "drop":
        place_R = torch.arange(num_rows, device=first_E.device) - first_E[routing.expert_R]
        rows = (place_R < capacity).nonzero().squeeze(1)
        limited = routing.token_R[rows], kept_E, routing.weight_R[rows]
    else:
        limited = _padded(routing, first_E, kept_E, capacity)
    token_R, counts_E, weight_R = limited
    return replace(routing, token_R=token_R, counts_E=counts_E, weight_R=weight_R, dropped=dropped)


def _padded(routing: Routing, first_E: Tensor, kept_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, counts and weights of E · C rows."""
    place_C = torch.arange(capacity, device=first_E.device)
    is_real = (place_C < kept_E.unsqueeze(1)).flatten()
    row = (first_E.unsqueeze(1) + place_C).flatten().where(is_real, 0)
    token = routing.token_R[row].where(is_real, routing.num_tokens - 1)
    return token, torch.full_like(kept_E, capacity), routing.weight_R[row].where(is_real, 0.0)

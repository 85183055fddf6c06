"""Which tokens go to which experts, and with which weights they come back.

Shapes: T tokens, E experts, K top-k, R rows: a row is one assignment of a token to an expert.
"""

from dataclasses import dataclass

import torch
from sparsetrain_kernels import sort_by_expert
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What a router says about the T tokens of a call. Rows are sorted by expert, then by token.

    A token may have any number of rows, none included.
    """

    token_R: Tensor
    """int64, the token of each row."""
    counts_E: Tensor
    """int64, rows of each expert; they add up to R."""
    weight_R: Tensor
    """What an expert's output is multiplied with before a token's rows are added up; float32 or float64, with the
    router's gradient."""
    num_tokens: int
    """T."""
    dropped: Tensor
    """0-d int64: assignments left out because their expert was full."""
    scores_TE: Tensor | None = None
    """For the load-balance loss: how much a token wants each expert, adding up to 1; None where nothing is learned."""
    logits_TE: Tensor | None = None
    """For the z-loss: what scores come from."""

    @classmethod
    def of_choices(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor,
        num_experts: int,
        *,
        scores_TE: Tensor | None = None,
        logits_TE: Tensor | None = None,
    ) -> "Routing":
        """Where every token has K experts of its own, no two the same.

        Args:
            expert_TK: int64.
            weight_TK: Of each choice.
            num_experts: E.
            scores_TE: As above.
            logits_TE: As above.
        """
        token_R, row_of_TK, counts_E = sort_by_expert(expert_TK, num_experts)
        return cls(
            token_R=token_R,
            counts_E=counts_E,
            weight_R=torch.empty_like(weight_TK).flatten().scatter(0, row_of_TK.flatten(), weight_TK.flatten()),
            num_tokens=len(expert_TK),
            dropped=torch.zeros((), dtype=torch.int64, device=expert_TK.device),
            scores_TE=scores_TE,
            logits_TE=logits_TE,
        )

    @classmethod
    def of_mask(
        cls,
        chosen_TE: Tensor,
        weight_TE: Tensor,
        *,
        scores_TE: Tensor | None = None,
        logits_TE: Tensor | None = None,
    ) -> "Routing":
        """Where tokens have as many experts as they like.

        Args:
            chosen_TE: bool.
            weight_TE: Read where chosen.
            scores_TE: As above.
            logits_TE: As above.
        """
        expert_R, token_R = chosen_TE.mT.nonzero(as_tuple=True)
        return cls(
            token_R=token_R,
            counts_E=chosen_TE.sum(0),
            weight_R=weight_TE.flatten().gather(0, token_R * chosen_TE.shape[1] + expert_R),
            num_tokens=len(chosen_TE),
            dropped=torch.zeros((), dtype=torch.int64, device=chosen_TE.device),
            scores_TE=scores_TE,
            logits_TE=logits_TE,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts_E)

    @property
    def expert_R(self) -> Tensor:
        """int64, the expert of each row."""
        experts_E = torch.arange(self.num_experts, device=self.counts_E.device)
        return experts_E.repeat_interleave(self.counts_E, output_size=len(self.token_R))

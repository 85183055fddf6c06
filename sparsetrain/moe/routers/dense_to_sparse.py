"""From all experts to a few, in the course of the training."""

import torch
from torch import Tensor

from sparsetrain.config.moe import DenseToSparse
from sparsetrain.moe.routers.base import LearnedRouter
from sparsetrain.moe.routing import Routing


class DenseToSparseRouter(LearnedRouter):
    """s = softmax((W x + ζ)/τ); a token uses the experts with s ≥ threshold, and the top_k in any case.

    The dense-to-sparse gate of EvoMoE (arXiv 2112.14397, sec. 4.2): τ falls geometrically from start_temperature to
    end_temperature, so that s sharpens and fewer and fewer experts pass the threshold; from the fraction `until` of the
    training on, a token uses its top_k alone. The weights are s. ζ is Gumbel noise in training passes, or 0 without
    `noise`; it is drawn from torch's generator, so with it results depend on how tokens are spread over ranks.

    The paper's first stage, one expert that is trained alone and then diversified, is a dense model and upcycling
    (`sparsetrain.moe.upcycle`).
    """

    def __init__(self, config: DenseToSparse, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim, num_experts, top_k)
        self.config = config
        self.temperature = config.start_temperature
        self.is_sparse = False
        """Whether only the top_k are used."""

    def set_progress(self, fraction: float) -> None:
        """Set the temperature for the fraction of the training that is done."""
        start, end = self.config.start_temperature, self.config.end_temperature
        self.temperature = start * (end / start) ** min(fraction / self.config.until, 1.0)
        self.is_sparse = fraction >= self.config.until

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`."""
        logits_TE = self.logits(x_TD)
        noisy_TE = logits_TE
        if self.config.noise and self.training and torch.is_grad_enabled():
            noisy_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()
        scores_TE = (noisy_TE / self.temperature).softmax(dim=-1)
        weight_TK, expert_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.is_sparse:
            return Routing.of_choices(expert_TK, weight_TK, self.num_experts, scores_TE=scores_TE, logits_TE=logits_TE)
        chosen_TE = (scores_TE >= self.config.threshold).scatter_(1, expert_TK, True)
        return Routing.of_mask(chosen_TE, scores_TE, scores_TE=scores_TE, logits_TE=logits_TE)

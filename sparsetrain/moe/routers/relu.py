"""As many experts as have a positive score."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.config.moe import ReluGate
from sparsetrain.moe.routers.base import LearnedRouter
from sparsetrain.moe.routing import Routing

_STEEPNESS = 100.0
"""Factor inside the sigmoid that stands for "is used" in the locality loss; the authors' value."""
_TINY = 1e-20


class ReluRouter(LearnedRouter):
    """a = ReLU(W x); a token uses the experts with a > 0, with weights RMSNorm(a) (BlockFFN, arXiv 2507.08771).

    Differentiable throughout, and a token may have any number of experts, none included. Two losses keep the number low
    for chunks of consecutive tokens together (sec. 3.3): `chunk_loss` · the share of experts that a chunk uses, and
    `locality_loss` · the cross entropy between what neighbouring tokens use. For losses, scores are a/Σa.
    """

    def __init__(self, config: ReluGate, dim: int, num_experts: int, top_k: int, eps: float = 1e-6) -> None:
        super().__init__(dim, num_experts, top_k)
        self.config = config
        self.norm = nn.RMSNorm(num_experts, eps)

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`."""
        logits_TE = self.logits(x_TD)
        a_TE = logits_TE.relu()
        # By hand, as a model in half precision has the norm's weight in it, of which nn.RMSNorm warns.
        weight_TE = F.rms_norm(a_TE, self.norm.normalized_shape, self.norm.weight.to(a_TE.dtype), self.norm.eps)
        scores_TE = a_TE / (a_TE.sum(dim=-1, keepdim=True) + _TINY)
        return Routing.of_mask(a_TE > 0, weight_TE, scores_TE=scores_TE, logits_TE=logits_TE)

    def penalty(self, routing: Routing, seq_len: int) -> Tensor | None:
        """Both losses, weighted and summed over tokens."""
        assert routing.scores_TE is not None
        assert routing.logits_TE is not None
        shape = (-1, max(seq_len, 1), self.num_experts)
        chunks = chunk_sparsity_loss(routing.scores_TE.view(shape), self.config.chunk)
        return self.config.chunk_loss * chunks + self.config.locality_loss * locality_loss(
            routing.logits_TE.view(shape)
        )


def chunk_sparsity_loss(scores_SNE: Tensor, chunk: int) -> Tensor:
    """Σ over chunks of n · mean_e(1 − Π_t (1 − s_te)): the share of experts that the chunk's n tokens use together.

    Args:
        scores_SNE: Of S sequences of N tokens, each token's adding up to 1 or, where it uses no expert, 0.
        chunk: Tokens of a chunk; the last of a sequence may be shorter.
    """
    loss = scores_SNE.new_zeros(())
    for scores_SCE in torch.split(scores_SNE, chunk, dim=1):
        used_SE = 1 - (1 - scores_SCE).prod(dim=1)
        loss = loss + scores_SCE.shape[1] * used_SE.mean(dim=-1).sum()
    return loss


def locality_loss(logits_SNE: Tensor) -> Tensor:
    """N · Σ over sequences of the mean binary cross entropy between neighbouring tokens' sigmoid(100 · logit).

    Args:
        logits_SNE: Of S sequences of N tokens.
    """
    num_sequences, seq_len, _ = logits_SNE.shape
    if seq_len < 2 or num_sequences == 0:
        return logits_SNE.new_zeros(())
    steep = _STEEPNESS * logits_SNE
    mean = F.binary_cross_entropy_with_logits(steep[:, :-1], steep[:, 1:].sigmoid())
    return num_sequences * seq_len * mean

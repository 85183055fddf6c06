"""The choice in plain torch: what the other implementation is held against, and the one for CPUs.

Shapes: T tokens, E experts, K top-k.
"""

from torch import Tensor


def choose(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Weights [T, K] and experts, int64 [T, K], by falling score."""
    score_TK, expert_TK = logits_TE.softmax(dim=-1).topk(top_k, dim=-1)
    return score_TK / score_TK.sum(dim=-1, keepdim=True) if renormalise else score_TK, expert_TK


def choose_backward(dweight_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, renormalise: bool) -> Tensor:
    """The gradient by logits."""
    scores_TE = logits_TE.softmax(dim=-1)
    score_TK = scores_TE.gather(1, expert_TK)
    if renormalise:  # the weights are a softmax over the chosen
        weight_TK = score_TK / score_TK.sum(dim=-1, keepdim=True)
        d_TK = weight_TK * (dweight_TK - (dweight_TK * weight_TK).sum(dim=-1, keepdim=True))
        return logits_TE.new_zeros(logits_TE.shape).scatter_(1, expert_TK, d_TK)
    d_TE = -scores_TE * (dweight_TK * score_TK).sum(dim=-1, keepdim=True)
    return d_TE.scatter_add_(1, expert_TK, dweight_TK * score_TK)

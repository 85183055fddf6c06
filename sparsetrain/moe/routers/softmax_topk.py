"""The top_k largest of a softmax."""

from sparsetrain_kernels import router_top_k
from torch import Tensor

from sparsetrain.config.moe import SoftmaxTopK
from sparsetrain.moe.routers.base import LearnedRouter
from sparsetrain.moe.routing import Routing


class SoftmaxTopKRouter(LearnedRouter):
    """s = softmax(W x); a token uses the top_k experts of the largest s (arXiv 1701.06538, 2401.04088).

    The weights are s, divided by their sum over the chosen with `renormalise`. Which of equal scores wins is not said.
    """

    def __init__(self, config: SoftmaxTopK, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim, num_experts, top_k)
        self.renormalise = config.renormalise
        self.weight_sum = 1.0 if config.renormalise or top_k == num_experts else None

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`."""
        logits_TE = self.logits(x_TD)
        weight_TK, expert_TK = router_top_k(logits_TE, self.top_k, renormalise=self.renormalise)
        scores_TE = logits_TE.softmax(dim=-1)
        return Routing.of_choices(expert_TK, weight_TK, self.num_experts, scores_TE=scores_TE, logits_TE=logits_TE)

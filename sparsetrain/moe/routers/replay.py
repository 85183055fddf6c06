"""Routes that reproduce a recorded load."""

import numpy as np
import torch
from torch import Tensor

from sparsetrain.config.moe import Replay
from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.moe.placement.trace import LoadTrace
from sparsetrain.moe.routers.base import LearnedRouter
from sparsetrain.moe.routing import Routing


class ReplayRouter(LearnedRouter):
    """Tokens are dealt to experts so that an expert gets its share of a trace's load in the same step, rounded.

    No expert gets a token twice: what exceeds one row a token goes to the others. The weights are the softmax of W x
    over the dealt experts, so that the layer costs and learns what it would with softmax_topk. Steps are counted by
    `after_step`, and after the trace's last one it begins anew; `MoEController` saves and restores the count.

    Raises:
        PlacementError: The trace cannot be read, or has another number of experts or top_k, or too few layers.
    """

    weight_sum = 1.0

    def __init__(self, config: Replay, dim: int, num_experts: int, top_k: int, layer: int) -> None:
        super().__init__(dim, num_experts, top_k)
        self.path, self.layer, self.step = config.trace, layer, 0
        self.trace = LoadTrace.load(config.trace)
        self.check_model(max(self.trace.num_layers, layer + 1))
        self.source: int | None = None
        """Whose load to reproduce, where the trace has it by source rank; None for that of all together."""

    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens; see `Router.forward`."""
        logits_TE = self.logits(x_TD)
        expert_TK = self._deal(len(x_TD)).to(x_TD.device)
        weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        return Routing.of_choices(
            expert_TK, weight_TK, self.num_experts, scores_TE=logits_TE.softmax(dim=-1), logits_TE=logits_TE
        )

    def check_model(self, num_layers: int) -> None:
        """Refuse the trace of a model with another number of MoE layers.

        Raises:
            PlacementError: It is that.
        """
        try:
            self.trace.check_model(num_layers, self.num_experts, self.top_k)
        except PlacementError as error:
            raise PlacementError(f"router.trace = {self.path}: {error}") from None

    def after_step(self, counts_E: Tensor) -> None:
        """Go on to the load of the next step."""
        self.step += 1

    def go_on_from(self, step: int) -> None:
        """Go to the load of the step that is next."""
        self.step = step

    def _deal(self, num_tokens: int) -> Tensor:
        """The experts of each token, [T, K], no two of a token the same."""
        at = self.step % len(self.trace.step_N)
        if self.source is not None and self.trace.load_NLSE is not None:
            load_E = self.trace.load_NLSE[at, self.layer, self.source % self.trace.load_NLSE.shape[2]]
        else:
            load_E = self.trace.load_NLE[at, self.layer]
        rows_E = torch.from_numpy(share_rows(load_E, num_tokens * self.top_k, most=num_tokens))
        # Rows of an expert lie together, T at most: dealt out in turn, they meet different tokens.
        return torch.arange(self.num_experts).repeat_interleave(rows_E).view(self.top_k, num_tokens).mT


def share_rows(load_E: IntArray, total: int, most: int) -> IntArray:
    """Divide `total` rows in proportion to a load, by largest remainder, with at most so many for an expert.

    Args:
        load_E: int64, not negative; all zeros mean an even load.
        total: At most E · most.
        most: What an expert cannot take goes to the others in proportion, at last to those without load.

    Returns:
        int64 [E] that sums to `total`.
    """
    share_E, is_open_E, left = np.zeros(len(load_E)), np.ones(len(load_E), dtype=bool), float(total)
    while left > 0:
        weight_E = np.where(is_open_E, load_E, 0).astype(float)
        if not weight_E.any():
            weight_E = is_open_E.astype(float)
        wanted_E = left * weight_E / weight_E.sum()
        full_E = is_open_E & (wanted_E > most)
        if not full_E.any():
            share_E += wanted_E
            break
        share_E[full_E] = most
        is_open_E &= ~full_E
        left = total - most * float((~is_open_E).sum())
    rows_E = np.floor(share_E + 1e-9).astype(np.int64)
    remainder_E = np.where(rows_E < most, share_E - rows_E, -1.0)
    rows_E[np.argsort(-remainder_E, kind="stable")[: total - rows_E.sum()]] += 1
    return rows_E

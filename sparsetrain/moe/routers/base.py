"""What every router is."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from sparsetrain_kernels.precision import as_written
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsetrain.errors import MoeError
from sparsetrain.moe.routing import Routing


class Router(nn.Module, ABC):
    """Gives every token its experts.

    Args:
        num_experts: E.
        top_k: Experts that a token uses.

    Raises:
        MoeError: top_k is below 1 or above E.
    """

    losses: frozenset[str] = frozenset({"aux_loss", "z_loss"})
    """Which of the two its routings can be asked for: whether they have scores, and logits."""
    weight_sum: float | None = None
    """What the weights of a token's experts add up to, where that is the same for all tokens."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise MoeError(f"top_k = {top_k}: must be between 1 and num_experts = {num_experts}")
        self.num_experts, self.top_k = num_experts, top_k

    @abstractmethod
    def forward(self, x_TD: Tensor, *, seq_len: int | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: Activations.
            seq_len: Tokens of a sequence, of which T is a multiple; None: all are one sequence.
            token_ids_T: int64, the tokens' ids; None where the caller does not know them.
        """

    def penalty(self, routing: Routing, seq_len: int) -> Tensor | None:
        """A loss of the router's own, weighted and summed over the tokens of `routing`; None for none."""
        return None

    def check_model(self, num_layers: int) -> None:
        """Make sure that the router can serve in a model of so many MoE layers.

        Raises:
            SparsetrainError: It cannot.
        """

    def after_step(self, counts_E: Tensor) -> None:
        """An optimizer step was taken.

        Args:
            counts_E: int64, assignments to each expert in the step, summed over all ranks and micro-batches.
        """

    def go_on_from(self, step: int) -> None:
        """A training is resumed after so many steps."""

    def set_progress(self, fraction: float) -> None:
        """Training has come so far: 0 at its start, 1 at its end."""

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


class LearnedRouter(Router):
    """A router with a linear layer; its logits are computed in float32 also under autocast.

    Args:
        dim: D.
        num_experts: E.
        top_k: Experts that a token uses.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts, top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        """W x, in float32 or, for float64 inputs, float64: [T, E]."""
        logits_TE: Tensor = _ExactProduct.apply(x_TD, self.weight)  # type: ignore[no-untyped-call]
        return logits_TE


class _ExactProduct(torch.autograd.Function):
    """x wᵀ in float32 or better, that keeps x for its gradient in the dtype that x has."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with as_written(x_TD.device):
            return x_TD.to(dtype) @ weight_ED.to(dtype).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        dtype = dlogits_TE.dtype
        with as_written(x_TD.device):
            dx_TD = (dlogits_TE @ weight_ED.to(dtype)).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
            dweight_ED = dlogits_TE.mT @ x_TD.to(dtype)
        return dx_TD, dweight_ED.to(weight_ED.dtype)

"""Cross entropy of a linear output head, without ever holding the logits of all tokens.

Shapes: N tokens, C tokens of a chunk, D model dim, V vocabulary.
"""

from typing import Any

import torch
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.precision import as_written, compute_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of a token that is not counted."""

# Logits of a chunk, in bytes: small enough for a CPU's cache, large enough to fill a GPU.
_CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def linear_cross_entropy(x: Tensor, weight_VD: Tensor, targets: Tensor) -> Tensor:
    """Sum over counted tokens of −log softmax(weight · x)[target].

    Gradients are computed along with the loss, chunk by chunk (as logits are at hand then) and scaled in the backward
    pass; the products run in the autocast dtype, softmax and the sums in float32 (float64 for float64 inputs).

    Args:
        x: Final activations [..., D].
        weight_VD: The head, or the embedding where they are tied.
        targets: int64 [...], `IGNORED` for tokens that are not counted.

    Returns:
        0-d, float32 or float64.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x.flatten(0, -2), weight_VD, targets.flatten())  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        dtype = compute_dtype(x_ND)
        exact = torch.promote_types(dtype, torch.float32)
        weight, x = weight_VD.to(dtype), x_ND.to(dtype)
        loss = torch.zeros((), dtype=exact, device=x_ND.device)
        dx_ND = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=exact) if ctx.needs_input_grad[1] else None
        chunk = max(1, _CHUNK_BYTES.get(x_ND.device.type, _CHUNK_BYTES["cuda"]) // (exact.itemsize * len(weight)))
        # Taken once: memory of this size is costly to get anew for every chunk.
        logits, p = (new_result(x, min(chunk, len(x)), len(weight), dtype=of) for of in (dtype, exact))
        with as_written(x_ND.device):
            for start in range(0, len(x), chunk):
                here = slice(start, start + chunk)
                x_CD, targets_C = x[here], targets_N[here]
                logits_CV = torch.mm(x_CD, weight.mT, out=logits[: len(x_CD)])
                dlogits_CV = _cross_entropy(logits_CV, targets_C, loss, p[: len(x_CD)])
                if dtype != exact:
                    dlogits_CV = logits_CV.copy_(dlogits_CV)
                counted_C1 = (targets_C != IGNORED).unsqueeze(1)
                if dx_ND is not None:
                    torch.mm(dlogits_CV, weight, out=dx_ND[here]).mul_(counted_C1)
                if dweight_VD is not None:
                    dweight_VD += dlogits_CV.mT @ (x_CD * counted_C1)
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * dloss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor, loss: Tensor, p_CV: Tensor) -> Tensor:
    """Add the chunk's loss to `loss`; return its gradient by the logits, as if every token counted, in `p_CV`."""
    exact_CV = logits_CV if logits_CV.dtype == p_CV.dtype else p_CV.copy_(logits_CV)
    torch.softmax(exact_CV, dim=-1, out=p_CV)
    # log Σ exp by way of the largest probability: it is at least 1/V, and no logit is exponentiated twice.
    log_sum_C = logits_CV.amax(dim=-1).to(loss.dtype) - p_CV.amax(dim=-1).log()
    counted_C = targets_C != IGNORED
    index_C1 = targets_C.where(counted_C, 0).unsqueeze(1)
    loss += ((log_sum_C - logits_CV.gather(1, index_C1).squeeze(1)) * counted_C).sum()
    return p_CV.scatter_add_(1, index_C1, p_CV.new_full((), -1.0).expand(index_C1.shape))

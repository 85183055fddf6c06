"""The choice on a GPU in Triton: softmax, the K largest and their weights in one pass over the logits.

Shapes: T tokens, E experts, K top-k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.current_device import on_its_device


@on_its_device
def choose(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Weights [T, K] and experts, int64 [T, K], by falling score; of equal scores the first."""
    num_tokens, num_experts = logits_TE.shape
    weight_TK = logits_TE.new_empty(num_tokens, top_k)
    expert_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    if num_tokens > 0:
        sizes = _sizes(num_experts)
        _choose_kernel[triton.cdiv(num_tokens, sizes["BLOCK_T"]),](
            logits_TE,
            weight_TK,
            expert_TK,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            RENORMALISE=renormalise,
            K_PADDED=triton.next_power_of_2(top_k),
            **sizes,
        )
    return weight_TK, expert_TK


@on_its_device
def choose_backward(dweight_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, renormalise: bool) -> Tensor:
    """The gradient by logits."""
    dlogits_TE = torch.empty_like(logits_TE)
    (num_tokens, num_experts), top_k = logits_TE.shape, expert_TK.shape[1]
    if num_tokens > 0:
        sizes = _sizes(num_experts)
        _choose_backward_kernel[triton.cdiv(num_tokens, sizes["BLOCK_T"]),](
            dweight_TK,
            logits_TE,
            expert_TK,
            dlogits_TE,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            RENORMALISE=renormalise,
            **sizes,
        )
    return dlogits_TE


def _sizes(num_experts: int) -> dict[str, int]:
    padded = triton.next_power_of_2(max(num_experts, 2))
    return {"BLOCK_T": max(1, 2048 // padded), "E_PADDED": padded}


@triton.jit
def _scores(logits_ptr, t, e, T, E):
    """softmax [BLOCK_T, E_PADDED] in float32; 0 beyond the last expert."""
    exists = (t < T)[:, None] & (e < E)[None, :]
    place = t.to(tl.int64)[:, None] * E + e[None, :]
    logits = tl.load(logits_ptr + place, mask=exists, other=0.0).to(tl.float32)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    scores = tl.exp(logits - tl.max(logits, 1)[:, None])
    return scores / tl.sum(scores, 1)[:, None]


@triton.jit
def _choose_kernel(
    logits_ptr,
    weight_ptr,
    expert_ptr,
    T,
    E,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """The choices of a block of tokens: K times the largest score that is left."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PADDED)
    left = tl.where((e < E)[None, :], _scores(logits_ptr, t, e, T, E), -1.0)
    chosen_score = tl.zeros((BLOCK_T, K_PADDED), dtype=tl.float32)
    nth = tl.arange(0, K_PADDED)
    for k in range(TOP_K):
        best = tl.max(left, 1)
        expert = tl.min(tl.where(left == best[:, None], e[None, :], E - 1), 1)
        left = tl.where(e[None, :] == expert[:, None], -1.0, left)
        chosen_score = tl.where(nth[None, :] == k, best[:, None], chosen_score)
        tl.store(expert_ptr + t.to(tl.int64) * TOP_K + k, expert.to(tl.int64), mask=t < T)
    if RENORMALISE:
        chosen_score /= tl.sum(chosen_score, 1)[:, None]
    place = t.to(tl.int64)[:, None] * TOP_K + nth[None, :]
    exists = (t < T)[:, None] & (nth < TOP_K)[None, :]
    tl.store(weight_ptr + place, chosen_score.to(weight_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _choose_backward_kernel(
    dweight_ptr,
    logits_ptr,
    expert_ptr,
    dlogits_ptr,
    T,
    E,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """The gradient by the logits of a block of tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PADDED)
    scores = _scores(logits_ptr, t, e, T, E)
    dweight = tl.zeros((BLOCK_T, E_PADDED), dtype=tl.float32)
    chosen = tl.zeros((BLOCK_T, E_PADDED), dtype=tl.float32)
    for k in range(TOP_K):
        expert = tl.load(expert_ptr + t.to(tl.int64) * TOP_K + k, mask=t < T, other=0)
        d = tl.load(dweight_ptr + t.to(tl.int64) * TOP_K + k, mask=t < T, other=0.0).to(tl.float32)
        is_it = (e[None, :] == expert[:, None]).to(tl.float32)
        chosen += is_it
        dweight += is_it * d[:, None]
    if RENORMALISE:  # the weights are a softmax over the chosen
        scores *= chosen
        scores /= tl.sum(scores, 1)[:, None]
    dlogits = scores * (dweight - tl.sum(dweight * scores, 1)[:, None])
    exists = (t < T)[:, None] & (e < E)[None, :]
    place = t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(dlogits_ptr + place, dlogits.to(dlogits_ptr.dtype.element_ty), mask=exists)

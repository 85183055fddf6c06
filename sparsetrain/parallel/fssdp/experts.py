"""Experts spread over ranks: rows travel to them, and back.

Shapes: T tokens, R rows of this rank, D model dim, E experts, S ranks of the expert group.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from sparsetrain_kernels import expert_ffn_backward, expert_ffn_forward
from sparsetrain_kernels.permute.op import backend_of
from sparsetrain_kernels.precision import compute_dtype
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsetrain.moe import Routing
from sparsetrain.parallel.fssdp.calls import Call
from sparsetrain.parallel.fssdp.collectives import Transfer
from sparsetrain.parallel.fssdp.exchange import Chunk
from sparsetrain.parallel.fssdp.replicas import LocalExperts
from sparsetrain.parallel.fssdp.runtime import Runtime
from sparsetrain.sharding import MomentsOf, WeightShard


class ShardedExperts(nn.Module):
    """Stands in for a layer's `Experts`; every rank of the group calls it equally often, with tokens or without.

    Args:
        runtime: Of all layers of the store.
        layer: Which of the store's layers this is.
    """

    def __init__(self, runtime: Runtime, layer: int) -> None:
        super().__init__()
        self.layer, self.runtime = layer, runtime

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sum over a token's rows of weight · expert(x): [T, D] in the dtype of the products.

        Raises:
            PlanMismatch: Ranks have different plans.
            RuntimeError: A rank has died, or is late by more than the group's timeout.
        """
        dtype = compute_dtype(x_TD)
        call = self.runtime.begin(self.layer, routing, dtype)
        # A weight among the inputs makes the backward pass come here also on a rank whose tokens need no gradient.
        anchor = self.runtime.store.trained_stack
        y_TD: Tensor = _Exchanged.apply(  # type: ignore[no-untyped-call]
            x_TD.to(dtype), routing.weight_R, anchor, routing.token_R, call, self.runtime
        )
        self.runtime.end(call)
        return y_TD

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        """Every expert's weights; see DescribesWeights."""
        return self.runtime.store.describe_layer(path)

    def shards_of_weights(self, path: str, moments: MomentsOf, replica_rank: int) -> list[WeightShard]:
        """What this rank holds of them; see DescribesWeights."""
        return self.runtime.store.shards_of_layer(self.layer, path, moments)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"layer={self.layer} of {self.runtime.store.extra_repr()}"


class _Exchanged(torch.autograd.Function):
    """Rows to their experts and back, chunk by chunk; each chunk travels while another one is computed."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_R: Tensor, _: Tensor, token_R: Tensor, call: Call, runtime: Runtime
    ) -> Tensor:
        order_R, rows = call.exchange.order_R, backend_of(x_TD)
        token, weight = token_R[order_R], weight_R[order_R]
        kept: list[tuple[Tensor, ...]] = []

        with call.timed():
            experts = call.local_experts(keep=ctx.needs_input_grad[2])

            def compute(chunk: Chunk, x: Tensor) -> Tensor:
                x = _by_slot(x, chunk)
                w_in, w_out, b_in, b_out = _slots(experts, chunk)
                y, saved = expert_ffn_forward(x, chunk.counts, w_in, w_out, b_in, b_out, call.activation)
                kept.append((x, *saved))
                return _by_source(y, chunk)

            y = _pipelined(rows.gather(x_TD.contiguous(), token), call, compute, "the experts")
        ctx.call, ctx.runtime, ctx.num_tokens = call, runtime, len(x_TD)
        ctx.num_kept = [len(tensors) for tensors in kept]
        ctx.save_for_backward(order_R, token, weight, y, *(tensor for tensors in kept for tensor in tensors))
        y_TD: Tensor = rows.combine(y, weight, token, len(x_TD))
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        order_R, token, weight, y, *kept = ctx.saved_tensors
        tensors, sizes, rows = iter(kept), iter(ctx.num_kept), backend_of(y)
        ctx.runtime.begin_backward(call)
        dy, dweight = rows.combine_backward(dy_TD.to(y.dtype).contiguous(), y, weight, token)
        with call.timed():
            experts, grads = call.local_experts(keep=True), call.gradients()

            def compute(chunk: Chunk, dy: Tensor) -> Tensor:
                x, *saved = islice(tensors, next(sizes))
                dx = expert_ffn_backward(
                    _by_slot(dy, chunk), x, tuple(saved), chunk.counts,
                    *_slots(experts, chunk), call.activation, *_slots(grads, chunk),
                )  # fmt: skip
                return _by_source(dx, chunk)

            dx = _pipelined(dy, call, compute, "the gradients of the experts")
            ctx.runtime.end_backward(call)
        dx_TD = rows.combine(dx, None, token, ctx.num_tokens) if ctx.needs_input_grad[0] else None
        dweight_R = torch.empty_like(dweight).index_copy_(0, order_R, dweight)
        return dx_TD, dweight_R, None, None, None, None


def _pipelined(sent: Tensor, call: Call, compute: Callable[[Chunk, Tensor], Tensor], what: str) -> Tensor:
    """Send rows away, have them computed where they arrive, and get the results back in the same order."""
    chunks, group = call.exchange.chunks, call.tokens
    what = f"exchanging rows with {what} of {call.path}"
    coming = [Transfer(sent[c.sent], c.sent_to, c.received_from, group, what=what) for c in chunks]
    going = []
    for chunk, transfer in zip(chunks, coming, strict=True):
        computed = transfer.wait()
        if chunk.counts:  # else a rank of few slots has none in this chunk, and nothing came
            with call.timed_experts(chunk.num_received):
                computed = compute(chunk, computed)
        going.append(Transfer(computed, chunk.received_from, chunk.sent_to, group, what=what))
    returned = [transfer.wait() for transfer in going]
    return returned[0] if len(returned) == 1 else torch.cat(returned)


def _by_slot(x: Tensor, chunk: Chunk) -> Tensor:
    return x if chunk.by_slot is None else x.index_select(0, chunk.by_slot)


def _by_source(y: Tensor, chunk: Chunk) -> Tensor:
    return y if chunk.by_slot is None else torch.empty_like(y).index_copy_(0, chunk.by_slot, y)


Lists = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None, Sequence[Tensor] | None]


def _slots(experts: LocalExperts, chunk: Chunk) -> Lists:
    b_in, b_out = (None if b is None else b[chunk.slots] for b in (experts.b_in, experts.b_out))
    return experts.w_in[chunk.slots], experts.w_out[chunk.slots], b_in, b_out

"""Calls of block-sparse attention and the float64 oracle that every implementation is held against.

The oracle builds its mask of tokens from the layout's mask of blocks alone; it shares nothing with the lists, ranges
and bounds that the implementations work from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sparsetrain_kernels import BlockLayout, block_sparse_attention
from sparsetrain_kernels.block_sparse_attention.reference import masked_attention
from torch import Tensor

from sparsetrain.testing import assert_close

GRADIENT_TOLERANCES = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (5e-2, 6e-2),
    torch.float16: (1e-2, 1e-2),
}
"""(relative, absolute) by dtype: sums over many keys and queries, whose terms were rounded to that dtype."""


@dataclass(frozen=True)
class Call:
    """Sizes and masking of a call; the layout is random, half of its blocks visible, but for a row without any."""

    batch: int = 2
    tokens: int = 64
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    block: int = 16
    lists: int = 2
    """Heads that the layout has lists for."""
    causal: bool = True
    borders: tuple[int, ...] = ()
    """cu_seqlens; () without documents."""
    scale: float | None = None

    def __str__(self) -> str:
        group = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}of{self.kv_heads}"
        layout = "shared" if self.lists == 1 else "perhead"
        parts = [f"B{self.batch}", f"S{self.tokens}", group, f"D{self.head_dim}", f"block{self.block}", layout]
        parts += ["causal"] * self.causal + ["documents"] * bool(self.borders) + ["scaled"] * (self.scale is not None)
        return "-".join(parts)

    def layout(self, seed: int = 0) -> BlockLayout:
        n = -(-self.tokens // self.block)
        mask = torch.rand(self.lists, n, n, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[0, -1] = False
        return BlockLayout.from_mask(mask, self.block)

    def cu_seqlens(self, device: str = "cpu") -> Tensor | None:
        return torch.tensor(self.borders, dtype=torch.int32, device=device) if self.borders else None

    def tensors(self, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
        """q, k, v, and gradients of output and log-sum-exp."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [
            (self.batch, self.tokens, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        shapes += [shapes[0], (self.batch, self.heads, self.tokens)]
        wide = torch.promote_types(dtype, torch.float32)
        return [torch.randn(shape, generator=generator).to(wide if len(shape) == 3 else dtype) for shape in shapes]

    def token_mask(self, layout: BlockLayout) -> Tensor:
        """Which keys each query sees, bool [B, H or 1, S, S]."""
        mask = layout.to_mask().repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        mask = mask[None, :, : self.tokens, : self.tokens].repeat(self.batch, 1, 1, 1)
        if self.causal:
            mask = mask.tril()
        for sample in range(self.batch if self.borders else 0):
            skipped = sample * self.tokens if self.borders[-1] == self.batch * self.tokens else 0
            document = torch.tensor([sum(b <= t + skipped for b in self.borders) for t in range(self.tokens)])
            mask[sample] &= document[:, None] == document
        return mask


CALLS = [
    Call(),
    Call(causal=False),
    Call(tokens=57, lists=1),
    Call(tokens=57, lists=1, causal=False, heads=3, kv_heads=3, head_dim=24),
    Call(batch=1, heads=4, kv_heads=2, lists=4, tokens=70, scale=0.5),
    Call(heads=4, kv_heads=1, lists=1, tokens=40),
    Call(borders=(0, 5, 5, 20, 64)),
    Call(tokens=57, causal=False, borders=(0, 30, 57), lists=1, heads=2, kv_heads=1),
    Call(tokens=50, causal=False, borders=(0, 7, 50, 61, 100), heads=2, kv_heads=1),
    Call(tokens=7, lists=1),
    Call(tokens=1, lists=1, batch=1, heads=1, kv_heads=1),
]


def finite(lse: Tensor) -> Tensor:
    """Zeros for the −∞ of queries that see no key: these have no gradient."""
    return lse.masked_fill(lse.isneginf(), 0.0)


def expected(call: Call, layout: BlockLayout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, k, v, in float64."""
    q, k, v, dout, dlse = (x.double() for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    scale = call.head_dim**-0.5 if call.scale is None else call.scale
    out, lse = masked_attention(*inputs, call.token_mask(layout), scale)
    loss = (out * dout).sum() + (finite(lse) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def computed(
    call: Call, layout: BlockLayout, tensors: Sequence[Tensor], implementation: str | None, device: str = "cpu"
) -> list[Tensor]:
    """The same from an implementation, on the CPU."""
    q, k, v, dout, dlse = (x.to(device) for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(
        *inputs,
        layout.to(device),
        causal=call.causal,
        scale=call.scale,
        cu_seqlens=call.cu_seqlens(device),
        return_lse=True,
        implementation=implementation,
    )
    gradients = torch.autograd.grad((out, finite(lse)), inputs, (dout, dlse))
    return [x.detach().cpu() for x in (out, lse, *gradients)]


def check(call: Call, dtype: torch.dtype, implementation: str | None, device: str = "cpu", seed: int = 0) -> None:
    """Fail unless output, log-sum-exp and all gradients are those of the oracle."""
    layout, tensors = call.layout(seed), call.tensors(dtype, seed + 1)
    oracle, actual = expected(call, layout, tensors), computed(call, layout, tensors, implementation, device)
    assert [x.dtype for x in actual] == [dtype, torch.promote_types(dtype, torch.float32), dtype, dtype, dtype]
    assert_close(actual[0], oracle[0])
    assert torch.equal(actual[1].isneginf(), oracle[1].isneginf())
    rtol, atol = GRADIENT_TOLERANCES[dtype]
    assert_close(finite(actual[1]), finite(oracle[1]), rtol=rtol, atol=atol)
    for gradient, wanted in zip(actual[2:], oracle[2:], strict=True):
        assert_close(gradient, wanted, rtol=rtol, atol=atol)

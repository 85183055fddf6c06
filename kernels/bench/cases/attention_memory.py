"""Memory of block-sparse attention on a long sequence: no matrix of scores, and peak bytes against the formula."""

from collections.abc import Iterator

import torch
from sparsetrain_kernels import BlockLayout
from sparsetrain_kernels.block_layout import Local, Random
from sparsetrain_kernels.block_sparse_attention import cpu

from bench.registry import AtMost, Bench, Row, case
from sparsetrain.testing import MemoryMeter

_TOKENS, _HEADS, _HEAD_DIM = 16384, 8, 64
_MIB = 2**20


@case("attention_memory", "peak bytes of block-sparse attention, 16,384 tokens, density 1/8, over the formula's")
def attention_memory(bench: Bench) -> Iterator[Row]:
    layout = BlockLayout.build(Random(16) | Local(2), _TOKENS, num_heads=_HEADS)
    visible = layout.visibility(1, _TOKENS, _TOKENS, causal=True)
    lists = 40 * int(layout.to_mask().sum())
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, dout = (torch.randn(1, _TOKENS, _HEADS, _HEAD_DIM, dtype=dtype) for _ in range(4))
        with MemoryMeter() as forward:
            out, lse = cpu.forward(q, k, v, visible, _HEAD_DIM**-0.5)
        with MemoryMeter() as backward:
            cpu.backward(dout, None, q, k, v, out, lse, visible, _HEAD_DIM**-0.5)
        formulas = 6 * q.nbytes + 6 * _MIB, (9 + 8 / q.element_size()) * q.nbytes + 12 * _MIB
        for what, meter, formula in zip(("forward", "backward"), (forward, backward), formulas, strict=True):
            scores = _TOKENS**2 * _HEADS * q.element_size()
            note = f"largest tensor {meter.largest_bytes / _MIB:.0f} MiB; all scores would be {scores / _MIB:,.0f} MiB"
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            peak, bound = [meter.peak_bytes / _MIB], [(formula + lists) / _MIB]
            yield Row(name, peak, bound, "formula", AtMost(1), unit="MiB", note=note)

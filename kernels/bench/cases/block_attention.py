"""Block-sparse attention against torch's dense operator and compiled FlexAttention, forward and backward apart.

Every call has its peer's right after it; both passes are timed in the same calls. What "of peak" means: products over
the visible scores alone, two forward and five backward, over the best rate of one large product in the same dtype. The
bytes are the least that a pass moves: q, k, v and the output; backward also three gradients and that of the output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from statistics import median

import torch
from sparsetrain_kernels import BlockLayout, block_sparse_attention
from sparsetrain_kernels.block_layout import Dense, Local, Pattern, Random, Sink, Strided
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from bench.attention_plots import draw
from bench.measure import seconds
from bench.registry import AtLeast, Bench, Row, Target, case

_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
_MATRICES = {"forward": 4, "backward": 8, "both": 12}


@dataclass(frozen=True)
class _Limits:
    """What the machine can do, as measured."""

    flops: float
    """FLOP/s of one large product."""
    bandwidth: float
    """Bytes per second, read and written, of one large copy."""


@dataclass(frozen=True)
class _Setting:
    """A layout at a size, and the target of both passes together."""

    name: str
    pattern: Pattern
    tokens: int
    heads: int
    head_dim: int
    causal: bool = True
    target: Target | None = None
    flex: bool = False
    """Against FlexAttention too; on a CPU in the forward pass alone, as it has no other there."""

    def layout(self, device: str) -> BlockLayout:
        return BlockLayout.build(self.pattern, self.tokens, num_heads=self.heads, causal=self.causal).to(device)

    @property
    def flops_a_product(self) -> float:
        """2 · visible scores · head dim, over all heads."""
        layout = self.layout("cpu")
        blocks = layout.to_mask().sum().item() * (self.heads // layout.num_heads)
        on_diagonal = layout.to_mask().diagonal(dim1=1, dim2=2).sum().item() * (self.heads // layout.num_heads)
        hidden = on_diagonal * layout.block * (layout.block - 1) / 2 if self.causal else 0
        return 2 * (blocks * layout.block**2 - hidden) * self.head_dim


_CPU = [
    _Setting("random 1/8", Random(8), 4096, 8, 64, causal=False, target=AtLeast(4)),
    _Setting("S2 1/8", Strided(16) | Local(2), 4096, 8, 64, target=AtLeast(2.5), flex=True),
    _Setting("local + sink 1/8", Local(3) | Sink(1), 4096, 8, 64, target=AtLeast(2.5)),
    _Setting("random 1/2", Random(16), 2048, 8, 64, causal=False),
    _Setting("random 1/4", Random(8), 2048, 8, 64, causal=False),
    _Setting("random 1/8", Random(4), 2048, 8, 64, causal=False),
    _Setting("dense", Dense(), 1024, 8, 64),
]
_CUDA = [
    _Setting(name, pattern(tokens // 64), tokens, 16, 128, causal, flex=True)
    for tokens in (4096, 16384)
    for name, pattern, causal in (
        ("dense", lambda n: Dense(), True),
        ("random 1/8", lambda n: Random(n // 8), False),
        ("S2 1/8", lambda n: Strided(16) | Local(n // 32), True),
        ("local + sink 1/16", lambda n: Local(n // 32) | Sink(1), True),
    )
]


@case("block_attention", "block-sparse attention over dense and FlexAttention", ("cpu", "cuda"), draw)
def block_attention(bench: Bench) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16) if bench.device == "cpu" else (torch.bfloat16,):
        limits = _Limits(_peak(dtype, bench), _bandwidth(bench))
        for setting in _CPU if bench.device == "cpu" else _CUDA:
            layout = setting.layout(bench.device)
            ours = partial(block_sparse_attention, layout=layout, causal=setting.causal)
            dense = partial(_dense, causal=setting.causal)
            yield from _rows(setting, dtype, bench, ours, dense, "dense SDPA", limits)
            if bench.device == "cuda" and find_spec("flash_attn") is not None:
                flash = partial(_flash, causal=setting.causal)
                yield from _rows(setting, dtype, bench, ours, flash, "FlashAttention", limits)
            if setting.flex:
                torch.compiler.reset()  # there is a limit on shapes compiled of one function
                flex = torch.compile(flex_attention, dynamic=False)
                mask = layout.to_block_mask(setting.tokens, causal=setting.causal)
                theirs = partial(_with_flex, flex=flex, mask=mask)
                yield from _rows(setting, dtype, bench, ours, theirs, "FlexAttention", limits)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Dense attention by the package flash_attn."""
    return import_module("flash_attn").flash_attn_func(q, k, v, causal=causal)


def _rows(
    setting: _Setting,
    dtype: torch.dtype,
    bench: Bench,
    ours: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    peer_name: str,
    limits: "_Limits",
) -> Iterator[Row]:
    """Forward, backward and both, of one peer."""
    shape = 1, setting.tokens, setting.heads, setting.head_dim
    trained = bench.device == "cuda" or peer_name == "dense SDPA"
    inputs = [torch.randn(shape, dtype=dtype, device=bench.device).requires_grad_(trained) for _ in range(3)]
    dout = torch.randn(shape, dtype=dtype, device=bench.device)
    samples: dict[Callable[..., Tensor], list[tuple[float, float]]] = {ours: [], peer: []}
    for pair in range(-2, bench.pairs):
        for function in (ours, peer) if pair % 2 else (peer, ours):
            sample = _forward_backward(function, inputs, dout)
            if pair >= 0:
                samples[function].append(sample)
    density = setting.layout("cpu").density(causal=setting.causal)
    label = f"{setting.name}, {setting.tokens} tokens, {str(dtype).removeprefix('torch.')}"
    matrix_bytes = inputs[0].nbytes
    for what in ("forward", "backward", "both") if trained else ("forward",):
        ours_s, peer_s = ([_part(sample, what) for sample in samples[function]] for function in (ours, peer))
        flops, moved = setting.flops_a_product * _PRODUCTS[what], _MATRICES[what] * matrix_bytes
        rate, least_s = flops / median(ours_s), max(flops / limits.flops, moved / limits.bandwidth)
        note = f"density {density:.3f}, {rate / 1e9:.4g} GFLOP/s, {rate / limits.flops:.0%} of peak"
        target = setting.target if peer_name == "dense SDPA" and what == "both" else None
        details: dict[str, float | str] = {
            "pattern": setting.name,
            "tokens": setting.tokens,
            "causal": setting.causal,
            "dtype": str(dtype).removeprefix("torch."),
            "pass": what,
            "density": round(density, 4),
            "active_gflop": round(flops / 1e9, 4),
            "megabytes": round(moved / 1e6, 4),
            "gflop_per_s": round(rate / 1e9, 2),
            "peak_gflop_per_s": round(limits.flops / 1e9, 2),
            "peak_gb_per_s": round(limits.bandwidth / 1e9, 2),
            "share_of_roofline": round(least_s / median(ours_s), 4),
        }
        yield Row(f"{label}, {what}", ours_s, peer_s, peer_name, target, note=note, details=details)


def _forward_backward(function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> tuple[float, float]:
    """Seconds of each pass; 0 for the backward pass of inputs without gradients."""
    outputs: list[Tensor] = []
    forward = seconds(lambda: outputs.append(function(*inputs)))
    if not inputs[0].requires_grad:
        return forward, 0.0
    return forward, seconds(lambda: torch.autograd.grad(outputs[0], inputs, dout))


def _part(sample: tuple[float, float], what: str) -> float:
    return {"forward": sample[0], "backward": sample[1], "both": sum(sample)}[what]


def _dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def _with_flex(q: Tensor, k: Tensor, v: Tensor, *, flex: Callable[..., Tensor], mask: object) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return flex(*heads_first, block_mask=mask).transpose(1, 2)


def _peak(dtype: torch.dtype, bench: Bench) -> float:
    """FLOP/s of the fastest of several large products."""
    size = 1024 if bench.device == "cpu" else 8192
    a, b = (torch.randn(rows, size, dtype=dtype, device=bench.device) for rows in (4096, size))
    seconds(lambda: torch.mm(a, b))
    return 2 * 4096 * size**2 / min(seconds(lambda: torch.mm(a, b)) for _ in range(bench.pairs))


def _bandwidth(bench: Bench) -> float:
    """Bytes per second of the fastest of several large copies."""
    source = torch.ones(2**26 if bench.device == "cpu" else 2**29, device=bench.device)
    target = torch.empty_like(source)
    seconds(lambda: target.copy_(source))
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(bench.pairs))

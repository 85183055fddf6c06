"""Products of experts and permutation on a GPU: over torch's grouped_mm, and over a copy of the same bytes.

The shapes are those of a layer with 8 experts of which a token uses 2, with rows spread evenly and with half of all on
one expert. The note says what is reached of the matmul peak, or of the bandwidth.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import AtLeast, Bench, Row, case

NUM_EXPERTS, TOP_K, DIM, FFN_DIM, TOKENS = 8, 2, 4096, 14336, 8192
ROWS = TOKENS * TOP_K
LOADS = {"even": [ROWS // NUM_EXPERTS] * NUM_EXPERTS, "half on one": [ROWS // 2, *[ROWS // 14] * 7]}


@case("expert_gemm", f"expert GEMM and permute, E{NUM_EXPERTS} k{TOP_K} d{DIM} f{FFN_DIM}, {TOKENS} tokens", ("cuda",))
def expert_gemm(bench: Bench) -> Iterator[Row]:
    for load, counts in LOADS.items():
        counts = [*counts[:-1], ROWS - sum(counts[:-1])]
        yield _grouped_product(bench, load, counts)
        yield _hidden_layer(bench, load, counts)
    yield _permutation(bench)


def _grouped_product(bench: Bench, load: str, counts: list[int]) -> Row:
    """Forward and backward of rows times weights."""
    from sparsetrain_kernels import grouped_mm

    x_RD, w_EDF, offs_E = _random(ROWS, DIM), _random(NUM_EXPERTS, FFN_DIM, DIM).mT, _ends(counts)
    dy_RF = _random(ROWS, FFN_DIM)

    def step(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        leaves = x_RD.detach().requires_grad_(), w_EDF.detach().requires_grad_()
        return lambda: torch.autograd.grad(product(*leaves), leaves, dy_RF)

    row = bench.compare(
        f"grouped GEMM f+b bf16, {load}",
        ours=step(lambda x, w: grouped_mm(x, w, offs_E)),
        peer=step(lambda x, w: F.grouped_mm(x, w, offs=offs_E)),
        peer_name="F.grouped_mm",
        target=AtLeast(1.0),
    )
    return _with_share_of_peak(row, 3 * 2 * ROWS * DIM * FFN_DIM)


def _hidden_layer(bench: Bench, load: str, counts: list[int]) -> Row:
    """Gather, first product and SwiGLU: in one kernel, and in torch's operators."""
    from sparsetrain_kernels import moe_ffn

    x_TD, weight_R, offs_E = _random(TOKENS, DIM), torch.rand(ROWS, device="cuda"), _ends(counts)
    token_R = torch.arange(ROWS, device="cuda") % TOKENS
    counts_E = torch.tensor(counts, device="cuda")
    w_in, w_out = _random(NUM_EXPERTS, 2 * FFN_DIM, DIM), _random(NUM_EXPERTS, DIM, FFN_DIM)

    def unfused() -> Tensor:
        gate, up = F.grouped_mm(x_TD[token_R], w_in.mT, offs=offs_E).chunk(2, dim=1)
        y_RD = F.grouped_mm(F.silu(gate) * up, w_out.mT, offs=offs_E)
        return torch.zeros_like(x_TD).index_add_(0, token_R, y_RD * weight_R.to(y_RD.dtype).unsqueeze(1))

    with torch.no_grad():
        row = bench.compare(
            f"experts forward bf16, {load}",
            ours=lambda: moe_ffn(x_TD, token_R, weight_R, counts_E, w_in, w_out),
            peer=unfused,
            peer_name="index, F.grouped_mm, silu, index_add",
            target=AtLeast(1.0),
        )
    return _with_share_of_peak(row, 2 * ROWS * 3 * DIM * FFN_DIM)


def _permutation(bench: Bench) -> Row:
    from sparsetrain_kernels import permute

    x_TD, token_R = _random(TOKENS, DIM), torch.randint(TOKENS, (ROWS,), device="cuda")
    source_RD, target_RD = _random(ROWS, DIM), _random(ROWS, DIM)
    row = bench.compare(
        "permute bf16",
        ours=lambda: permute(x_TD, token_R),
        peer=lambda: target_RD.copy_(source_RD),
        peer_name="a copy of as many rows",
        target=AtLeast(0.9),
    )
    return replace(row, note=f"{2 * target_RD.nbytes / median(row.ours) / 1e9:.0f} GB/s")


def _with_share_of_peak(row: Row, flops: int) -> Row:
    from sparsetrain.planning.hardware import measured_matmul_peak

    peak, ours, peer = measured_matmul_peak(torch.device("cuda"), torch.bfloat16), median(row.ours), median(row.peer)
    note = f"{flops / ours / 1e12:.0f} TFLOP/s, {flops / ours / peak:.0%} of a measured matmul peak"
    return replace(row, note=f"{note}; the peer {flops / peer / peak:.0%}")


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def _ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)

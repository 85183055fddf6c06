"""The machine's matmul peak, the yardstick for every share of peak."""

from collections.abc import Iterator
from statistics import median

import torch

from bench.measure import seconds
from bench.registry import Bench, Row, case


@case("matmul_peak", "largest dense product rate of torch.mm, 4096 x n x n, n = 512 to 2048", devices=("cpu", "cuda"))
def matmul_peak(bench: Bench) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        rates = max((_rates(size, dtype, bench) for size in (512, 1024, 2048)), key=median)
        yield Row(f"matmul peak, {str(dtype).removeprefix('torch.')}", rates, unit="GFLOP/s")


def _rates(size: int, dtype: torch.dtype, bench: Bench) -> list[float]:
    """GFLOP/s of each of several products of random matrices."""
    a, b = (torch.randn(rows, size, dtype=dtype, device=bench.device) for rows in (4096, size))
    seconds(lambda: torch.mm(a, b))
    return [2 * 4096 * size**2 / seconds(lambda: torch.mm(a, b)) / 1e9 for _ in range(bench.pairs)]

"""Sparse linears on a GPU: every implementation that computes a product there, over cuBLAS."""

from collections.abc import Iterator
from functools import partial

import torch
from sparsetrain_kernels.block_sparse_linear import implementations as block_linear
from sparsetrain_kernels.dispatch import DENSE, Operation, Problem
from sparsetrain_kernels.nm_linear import implementations as nm_linear

from bench.registry import AtLeast, Bench, Row, Unavailable, case

_SIZE = 4096
_VARIANTS = (  # density and target of each
    ((block_linear.OUTPUT, block_linear.INPUT_GRADIENT, block_linear.WEIGHT_GRADIENT), "128x128", 0.25, None),
    ((nm_linear.OUTPUT, nm_linear.INPUT_GRADIENT, nm_linear.WEIGHT_GRADIENT), "vector[64] 1:4", 0.25, AtLeast(2.5)),
    ((nm_linear.OUTPUT, nm_linear.INPUT_GRADIENT), "2:4, transposable", 0.5, AtLeast(1.15)),
)


@case("sparse_linear_cuda", "sparse linears 4096³ over cuBLAS, each product by each implementation", ("cuda",))
def sparse_linear_cuda(bench: Bench) -> Iterator[Row]:
    rows = [
        row
        for operations, variant, density, target in _VARIANTS
        for operation in operations
        for row in _over_dense(bench, operation, variant, density, target)
    ]
    if not rows:
        raise Unavailable("no implementation but the dense one computes these on this GPU; is Triton installed?")
    yield from rows


def _over_dense(
    bench: Bench, operation: Operation, variant: str, density: float, target: AtLeast | None
) -> Iterator[Row]:
    problem = Problem(operation.name, variant, "cuda", torch.bfloat16, (_SIZE,) * 3, density, 1)
    arguments = operation.arguments(problem)
    for name in operation.candidates(problem):
        ours, dense = (partial(operation.implementations[which].run, *arguments) for which in (name, DENSE))
        label = f"{operation.name} [{variant}], {name}, bfloat16"
        yield bench.compare(label, ours=ours, peer=dense, peer_name="cuBLAS", target=target, warmup=5)

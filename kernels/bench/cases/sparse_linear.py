"""Sparse linear layers over dense ones: block-sparse and vector n:m products, and sparsifying."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from sparsetrain_kernels import NMLinear, NMPattern, NMSelection, WeightBlocks, block_sparse_linear, nm_linear
from sparsetrain_kernels.block_sparse_linear import implementations as block_implementations
from sparsetrain_kernels.dispatch import DENSE, Operation, Problem
from sparsetrain_kernels.nm_linear import implementations as nm_implementations
from sparsetrain_kernels.nm_linear import sparsify_2_4
from torch import Tensor
from torch.nn import functional as F

from bench.registry import AtLeast, Bench, Row, case

_SIZE = 2048
_DTYPES = (torch.float32, torch.bfloat16)
_BLOCK_TARGETS = {  # of the output, by living blocks of 16 in a row
    (torch.float32, 4): 3.2,
    (torch.float32, 2): 6.0,
    (torch.bfloat16, 4): 2.8,
    (torch.bfloat16, 2): 5.8,
}


@case("block_sparse_linear", "block-sparse linear 2048³ over dense torch: output, both gradients, whole layer")
def block_sparse(bench: Bench) -> Iterator[Row]:
    for dtype in _DTYPES:
        for block, living in ((128, 4), (128, 2), (64, 8)):
            density = living * block / _SIZE
            target = AtLeast(_BLOCK_TARGETS[dtype, living]) if block == 128 else None
            for operation in _BLOCK_OPERATIONS:
                problem = _problem(operation, f"{block}x{block}", dtype, density)
                yield _product(
                    bench, operation, problem, "gather", target if operation is _BLOCK_OPERATIONS[0] else None
                )
    for dtype in _DTYPES:
        for block in (64, 128):
            layout = _random_blocks(block, 0.25)
            x, weight = _leaf(_SIZE, _SIZE, dtype=dtype), _leaf(_SIZE, _SIZE, dtype=dtype)
            yield bench.compare(
                f"block[{block},{block}] 75 %, forward and backward, {_name(dtype)}",
                ours=_step(partial(block_sparse_linear, x, weight, layout, zeroed=True), x, weight),
                peer=_step(partial(F.linear, x, weight), x, weight),
                peer_name="dense",
                target=AtLeast(1.5),
            )


@case(
    "nm_linear", "vector n:m linear 2048³ over dense torch: output, both gradients, whole layer; few tokens, compressed"
)
def nm(bench: Bench) -> Iterator[Row]:
    for dtype in _DTYPES:
        for pattern in (NMPattern(1, 4, 64), NMPattern(1, 4, 128), NMPattern(1, 8, 64)):
            for operation in _NM_OPERATIONS:
                yield _product(
                    bench, operation, _problem(operation, str(pattern), dtype, pattern.density), "gather", None
                )
    for dtype in _DTYPES:
        x, weight = _leaf(_SIZE, _SIZE, dtype=dtype), _leaf(_SIZE, _SIZE, dtype=dtype)
        selection = NMSelection.largest(weight, NMPattern(1, 4, 64))
        yield bench.compare(
            f"vector 1:4, forward and backward, {_name(dtype)}",
            ours=_step(partial(nm_linear, x, weight, selection, zeroed=True), x, weight),
            peer=_step(partial(F.linear, x, weight), x, weight),
            peer_name="dense",
            target=AtLeast(1.5),
        )
        for tokens in (4, 16):
            sparse = NMSelection.largest(weight, NMPattern(1, 16))
            values, few = sparse.compress(weight).detach(), x[:tokens].detach()
            yield bench.compare(
                f"compressed 1:16, {tokens} tokens, {_name(dtype)}",
                ours=partial(nm_linear, few, values, sparse),
                peer=partial(F.linear, few, weight.detach()),
                peer_name="dense weight",
            )


@case("sparsify_2_4", "2:4 mask and compressed form of a 4096 x 4096 matrix over torch's own")
def sparsify(bench: Bench) -> Iterator[Row]:
    from torch.ao.pruning import WeightNormSparsifier
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    linear = torch.nn.Linear(4096, 4096, bias=False)
    weight = linear.weight.detach().clone()

    def theirs() -> object:
        with torch.no_grad():
            linear.weight.copy_(weight)
        model = torch.nn.Sequential(linear)
        sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
        sparsifier.step()
        sparsifier.squash_mask()
        return sparse_semi_structured_from_dense_cutlass(linear.weight.detach())

    yield bench.compare(
        "2:4 mask and compress",
        ours=lambda: sparsify_2_4(weight),
        peer=theirs,
        peer_name="WeightNormSparsifier, from_dense",
        target=AtLeast(1.0),
        warmup=1,
    )
    layer = NMLinear(4096, 4096, "2:4")
    yield bench.compare(
        "2:4 mask",
        ours=layer.refresh,
        peer=lambda: torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter_(
            1, weight.view(-1, 4).abs().topk(2, 1).indices, True
        ),
        peer_name="topk of each four, scattered",
        target=AtLeast(1.0),
        warmup=1,
    )


_BLOCK_OPERATIONS = (
    block_implementations.OUTPUT,
    block_implementations.INPUT_GRADIENT,
    block_implementations.WEIGHT_GRADIENT,
)
_NM_OPERATIONS = (nm_implementations.OUTPUT, nm_implementations.INPUT_GRADIENT, nm_implementations.WEIGHT_GRADIENT)


def _product(bench: Bench, operation: Operation, problem: Problem, implementation: str, target: AtLeast | None) -> Row:
    ours, dense = _runs(operation, problem, implementation)
    zeros = f"{100 * (1 - problem.density):g} %"
    name = f"{operation.name} [{problem.variant}] {zeros}, {_name(problem.dtype)}"
    return bench.compare(name, ours=ours, peer=dense, peer_name=DENSE, target=target)


def _runs(operation: Operation, problem: Problem, implementation: str) -> list[Callable[[], object]]:
    """An implementation and the dense one on the same random arguments."""
    arguments = operation.arguments(problem)
    return [partial(operation.implementations[name].run, *arguments) for name in (implementation, DENSE)]


def _problem(operation: Operation, variant: str, dtype: torch.dtype, density: float) -> Problem:
    return Problem(operation.name, variant, "cpu", dtype, (_SIZE, _SIZE, _SIZE), density, torch.get_num_threads())


def _random_blocks(block: int, density: float) -> WeightBlocks:
    scores = torch.rand(_SIZE // block, _SIZE // block, generator=torch.Generator().manual_seed(0))
    kept = scores.topk(round(density * scores.shape[1]), 1).indices
    return WeightBlocks.from_mask(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True), (block, block))


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def _step(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """A forward and backward pass."""
    dy = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

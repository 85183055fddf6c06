"""The three products as operations of the dispatcher, and what tuning measures of them."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear import dense, gather
from sparsetrain_kernels.block_sparse_linear.layout import WeightBlocks
from sparsetrain_kernels.dispatch import DENSE, Implementation, Operation, Problem
from sparsetrain_kernels.tokens_last import (
    TOKENS_LAST,
    inputs_last,
    knows_tokens_first,
    outputs_last,
    random_inputs,
    random_outputs,
    reads_tokens_first,
)

_SEPARATOR = ", "
_TRITON_BLOCKS = (16, 32, 64, 128, 256)
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
_TOKENS = {"cpu": (512, 2048), "cuda": (4096, 16384)}
_FEATURES = {"cpu": (256, 1024, 4096), "cuda": (1024, 4096)}
_BLOCKS = (32, 64, 128)
_DENSITIES = (0.125, 0.25, 0.5)


def variant_of(block: tuple[int, int], tokens_last: bool = False) -> str:
    """The dispatcher's word for a kind of weight, such as "64x64" or "64x64, tokens last"."""
    return f"{block[0]}x{block[1]}" + (_SEPARATOR + TOKENS_LAST if tokens_last else "")


def _block_of(problem: Problem) -> tuple[int, int]:
    rows, columns = map(int, problem.variant.split(_SEPARATOR)[0].split("x"))
    return rows, columns


def _triton(name: str) -> Implementation:
    def run(*arguments: Any) -> Any:
        return getattr(import_module("sparsetrain_kernels.block_sparse_linear.triton"), name)(*arguments)

    return Implementation(run, ("cuda",), _suits_triton)


def _suits_triton(problem: Problem) -> bool:
    return (
        problem.dtype != torch.float64
        and set(_block_of(problem)) <= set(_TRITON_BLOCKS)
        and find_spec("triton") is not None
    )


def _measured(operation: str) -> Callable[[str], Iterator[Problem]]:
    def problems(device: str) -> Iterator[Problem]:
        threads = torch.get_num_threads() if device == "cpu" else 1
        features = _FEATURES[device]
        for sizes in product(_TOKENS[device], features, features):
            if prod(sizes[1:]) == features[-1] ** 2 and device == "cpu":
                continue  # as long as all others together
            orders = (False, True) if device == "cpu" and sizes[1] != sizes[2] else (False,)  # True: as in an MLP
            for dtype, block, density, last in product(_DTYPES[device], _BLOCKS, _DENSITIES, orders):
                if density * sizes[2] >= block:
                    variant = variant_of((block, block), last)
                    yield Problem(operation, variant, device, dtype, sizes, density, threads)

    return problems


def _layout(problem: Problem) -> WeightBlocks:
    """Random columns of blocks in each row, equally many."""
    _, num_outputs, num_inputs = problem.sizes
    rows, columns = _block_of(problem)
    scores_RC = torch.rand(num_outputs // rows, num_inputs // columns, generator=torch.Generator().manual_seed(0))
    kept = scores_RC.topk(round(problem.density * scores_RC.shape[1]), 1).indices
    mask = torch.zeros_like(scores_RC, dtype=torch.bool).scatter_(1, kept, True)
    return WeightBlocks.from_mask(mask, (rows, columns)).to(problem.device)


def _random(problem: Problem, *shape: int) -> Tensor:
    return torch.randn(shape, device=problem.device, dtype=problem.dtype)


def _masked(problem: Problem, layout: WeightBlocks) -> Tensor:
    return layout.unpack(layout.pack(_random(problem, *layout.grid.shape)))


# Times are kept of the case that is best for dense: a dense weight that needs no masking, no bias. Of a layer whose
# activations are stored tokens last that is the wider of its two.


def _output_arguments(problem: Problem) -> Sequence[Any]:
    layout = _layout(problem)
    how = layout.index, layout.grid, True, outputs_last(problem)
    return random_inputs(problem), _masked(problem, layout), None, *how


def _input_gradient_arguments(problem: Problem) -> Sequence[Any]:
    layout = _layout(problem)
    how = layout.index, layout.grid, True, inputs_last(problem)
    return random_outputs(problem), _masked(problem, layout), *how


def _weight_gradient_arguments(problem: Problem) -> Sequence[Any]:
    layout = _layout(problem)
    return random_outputs(problem), random_inputs(problem), layout.index, layout.grid, False, problem.dtype


def _operation(name: str, what: str, arguments: Callable[[Problem], Sequence[Any]]) -> Operation:
    only_first = reads_tokens_first if what == "weight_gradient" else knows_tokens_first
    implementations = {
        DENSE: Implementation(getattr(dense, what)),
        "gather": Implementation(getattr(gather, what), ("cpu",)),
        "triton": only_first(_triton(what)),
    }
    return Operation(name, implementations, _measured(name), arguments)


OUTPUT = _operation("block_sparse_linear.output", "output", _output_arguments)
INPUT_GRADIENT = _operation("block_sparse_linear.input_gradient", "input_gradient", _input_gradient_arguments)
WEIGHT_GRADIENT = _operation("block_sparse_linear.weight_gradient", "weight_gradient", _weight_gradient_arguments)

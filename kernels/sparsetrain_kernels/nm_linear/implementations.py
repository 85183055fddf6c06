"""The three products as operations of the dispatcher, and what tuning measures of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.dispatch import DENSE, Implementation, Operation, Problem
from sparsetrain_kernels.nm_linear import bag, dense, gather, semi_structured
from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.nm_linear.selection import NMSelection
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
_COMPRESSED, _TRANSPOSABLE = "compressed", "transposable"
_MIN_VECTOR = 16
"""Outputs of a group from which on gathering its inputs is worth trying."""
_TRITON_VECTORS = (16, 32, 64, 128, 256)
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
_TOKENS = {"cpu": (512, 2048), "cuda": (4096, 16384)}
_FEATURES = {"cpu": (256, 1024, 4096), "cuda": (1024, 4096)}
_VECTORS = (*(NMPattern(1, m, vector) for vector in (64, 128) for m in (2, 4, 8)), NMPattern(1, 4, 256))
_COMPRESSED_PATTERNS = (NMPattern(2, 4), NMPattern(1, 4), NMPattern(2, 8), NMPattern(1, 8), NMPattern(1, 16))


def variant_of(pattern: NMPattern, *, compressed: bool, transposable: bool, tokens_last: bool = False) -> str:
    """The dispatcher's word for a kind of weight, such as "2:4", "vector[64] 1:4" or "1:8, compressed".

    Vectors read and write activations that are stored tokens last in other times, so those are another variant.
    """
    flags = {_COMPRESSED: compressed, _TRANSPOSABLE: transposable, TOKENS_LAST: tokens_last and pattern.vector > 1}
    return _SEPARATOR.join([str(pattern), *(word for word, is_so in flags.items() if is_so)])


@cache
def _parse(variant: str) -> tuple[NMPattern, frozenset[str]]:
    pattern, *words = variant.split(_SEPARATOR)
    return NMPattern.parse(pattern), frozenset(words)


def _suits_gather(problem: Problem) -> bool:
    return _parse(problem.variant)[0].vector >= _MIN_VECTOR


def _suits_bag(problem: Problem) -> bool:
    pattern, words = _parse(problem.variant)
    return _COMPRESSED in words and pattern.vector == 1


def _suits_triton(problem: Problem) -> bool:
    pattern = _parse(problem.variant)[0]
    return pattern.vector in _TRITON_VECTORS and problem.dtype != torch.float64 and find_spec("triton") is not None


def _suits_tensor_cores(problem: Problem) -> bool:
    pattern, words = _parse(problem.variant)
    tokens, outputs, inputs = problem.sizes
    fits = (
        outputs % semi_structured.MULTIPLE
        == inputs % semi_structured.MULTIPLE
        == tokens % semi_structured.TOKEN_MULTIPLE
        == 0
    )
    two_of_four = pattern == NMPattern(2, 4) and _COMPRESSED not in words
    in_half = problem.dtype in (torch.bfloat16, torch.float16)
    return fits and two_of_four and in_half and tokens > 0 and semi_structured.is_available()


def _suits_tensor_cores_transposed(problem: Problem) -> bool:
    return _TRANSPOSABLE in _parse(problem.variant)[1] and _suits_tensor_cores(problem)


def _suits_triton_of_few(problem: Problem) -> bool:
    return _suits_bag(problem) and problem.dtype != torch.float64 and find_spec("triton") is not None


def _triton(what: str, suits: Callable[[Problem], bool] = _suits_triton) -> Implementation:
    def run(*arguments: Any) -> Any:
        return getattr(import_module("sparsetrain_kernels.nm_linear.triton"), what)(*arguments)

    return Implementation(run, ("cuda",), suits)


def _problems(operation: str, device: str) -> Iterator[Problem]:
    threads = torch.get_num_threads() if device == "cpu" else 1
    features = _FEATURES[device]
    for dtype, (tokens, outputs, inputs) in product(_DTYPES[device], product(_TOKENS[device], features, features)):
        if outputs == inputs == features[-1] and device == "cpu":
            continue  # as long as all others together
        patterns = [(pattern, "") for pattern in _VECTORS]
        if device == "cpu" and outputs != inputs:  # as in a layer of an MLP
            patterns += [(pattern, _SEPARATOR + TOKENS_LAST) for pattern in _VECTORS]
        if device == "cuda":
            patterns.append((NMPattern(2, 4), _SEPARATOR + _TRANSPOSABLE))
            patterns += [(NMPattern(2, 4), "")] * (operation == "nm_linear.output")
        for pattern, words in patterns:
            yield Problem(
                operation, f"{pattern}{words}", device, dtype, (tokens, outputs, inputs), pattern.density, threads
            )


def _output_problems(device: str) -> Iterator[Problem]:
    """Those of the other products, and compressed weights with few tokens."""
    yield from _problems("nm_linear.output", device)
    threads = torch.get_num_threads() if device == "cpu" else 1
    for dtype, tokens, features, pattern in product(
        _DTYPES[device], (1, 4, 16), _FEATURES[device], _COMPRESSED_PATTERNS
    ):
        variant = variant_of(pattern, compressed=True, transposable=False)
        sizes = (tokens, features, features)
        yield Problem("nm_linear.output", variant, device, dtype, sizes, pattern.density, threads)


def _random(problem: Problem, *shape: int) -> Tensor:
    return torch.randn(shape, device=problem.device, dtype=problem.dtype)


def _weight(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None, NMPattern]:
    """A random weight, its mask, its kept inputs and its pattern, in the form that the variant says."""
    pattern, words = _parse(problem.variant)
    weight = _random(problem, *problem.sizes[1:])
    is_transposable = _TRANSPOSABLE in words
    selection = NMSelection.transposable(weight) if is_transposable else NMSelection.largest(weight, pattern)
    if _COMPRESSED in words:
        return selection.compress(weight), None, selection.columns_GP, pattern
    return (
        torch.where(selection.mask(), weight, 0),
        selection.mask_GK,
        selection.columns_GP if pattern.vector > 1 else None,
        pattern,
    )


# Times are kept of the case that is best for dense: a whole weight that needs no masking, no bias. Of a layer whose
# activations are stored tokens last that is the wider of its two.


def _output_arguments(problem: Problem) -> Sequence[Any]:
    weight, *selection = _weight(problem)
    return random_inputs(problem), weight, None, *selection, True, outputs_last(problem)


def _input_gradient_arguments(problem: Problem) -> Sequence[Any]:
    return random_outputs(problem), *_weight(problem), problem.sizes[2], True, inputs_last(problem)


def _weight_gradient_arguments(problem: Problem) -> Sequence[Any]:
    _, *selection = _weight(problem)
    return random_outputs(problem), random_inputs(problem), *selection, False, problem.dtype


def _vector_problems(operation: str) -> Callable[[str], Iterator[Problem]]:
    return lambda device: _problems(operation, device)


OUTPUT = Operation(
    "nm_linear.output",
    {
        DENSE: Implementation(dense.output),
        "gather": Implementation(gather.output, ("cpu",), _suits_gather),
        "bag": knows_tokens_first(Implementation(bag.output, ("cpu",), _suits_bag)),
        "semi_structured": knows_tokens_first(Implementation(semi_structured.output, ("cuda",), _suits_tensor_cores)),
        "triton": knows_tokens_first(_triton("output")),
        "triton_of_few": knows_tokens_first(_triton("output_of_few", _suits_triton_of_few)),
    },
    _output_problems,
    _output_arguments,
)
INPUT_GRADIENT = Operation(
    "nm_linear.input_gradient",
    {
        DENSE: Implementation(dense.input_gradient),
        "gather": Implementation(gather.input_gradient, ("cpu",), _suits_gather),
        "semi_structured": knows_tokens_first(
            Implementation(semi_structured.input_gradient, ("cuda",), _suits_tensor_cores_transposed)
        ),
        "triton": knows_tokens_first(_triton("input_gradient")),
    },
    _vector_problems("nm_linear.input_gradient"),
    _input_gradient_arguments,
)
WEIGHT_GRADIENT = Operation(
    "nm_linear.weight_gradient",
    {
        DENSE: Implementation(dense.weight_gradient),
        "gather": Implementation(gather.weight_gradient, ("cpu",), _suits_gather),
        "triton": reads_tokens_first(_triton("weight_gradient")),
    },
    _vector_problems("nm_linear.weight_gradient"),
    _weight_gradient_arguments,
)

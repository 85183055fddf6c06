"""The dispatcher: whether what it chooses is ever slower than dense, and what choosing costs a call."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from sparsetrain_kernels.block_sparse_attention import implementations as attention
from sparsetrain_kernels.block_sparse_linear import implementations as block_linear
from sparsetrain_kernels.dispatch import DENSE, Implementation, Operation, Problem
from sparsetrain_kernels.nm_linear import NMPattern
from sparsetrain_kernels.nm_linear import implementations as nm_linear

from bench.measure import interleave
from bench.registry import AtLeast, AtMost, Bench, Row, Unavailable, case

_DTYPES = (torch.float32, torch.bfloat16)
_SHAPES = 200
_BLOCK_OPERATIONS = (block_linear.OUTPUT, block_linear.INPUT_GRADIENT, block_linear.WEIGHT_GRADIENT)
_NM_OPERATIONS = (nm_linear.OUTPUT, nm_linear.INPUT_GRADIENT, nm_linear.WEIGHT_GRADIENT)
_ATTENTION = (attention.FORWARD, attention.BACKWARD)
_PAIRS_OF_SHAPE_S = 1.0
"""A shape is measured in 7 pairs, in fewer where these take longer than so many seconds, but never in fewer than 3."""

Draw = Callable[[np.random.Generator, torch.dtype], tuple[Operation, Problem]]


@case("dispatch_linear", "the dispatcher's choices over dense on 200 random shapes of sparse linears")
def dispatch_linear(bench: Bench) -> Iterator[Row]:
    yield from _choices(bench, _random_linear)


@case("dispatch_attention", "the dispatcher's choices over dense on 200 random shapes of block-sparse attention")
def dispatch_attention(bench: Bench) -> Iterator[Row]:
    yield from _choices(bench, _random_attention)


@case("dispatch_overhead", "microseconds that choosing an implementation adds to a call")
def dispatch_overhead(bench: Bench) -> Iterator[Row]:
    x, sizes, calls = torch.ones(1), (2048, 2048, 2048), 1000
    nothing = Operation("nothing", {DENSE: Implementation(lambda: None)})

    def chosen() -> None:
        for _ in range(calls):
            nothing.run(x, ("64x64", sizes, 0.25))

    def bare() -> None:
        for _ in range(calls):
            nothing.implementations[DENSE].run()

    pairs = zip(*interleave(chosen, bare, pairs=bench.pairs), strict=True)
    yield Row("choosing, a call", [(a - b) / calls * 1e6 for a, b in pairs], target=AtMost(5), unit="µs")


def _choices(bench: Bench, draw: Draw) -> Iterator[Row]:
    """The choice that is worst by the upper end of its interval, of each dtype; others are told of in its note."""
    random = np.random.default_rng(0)
    for dtype in _DTYPES:
        drawn = 10 if bench.quick else _SHAPES // len(_DTYPES)
        found = [_choice_over_dense(*draw(random, dtype)) for _ in range(drawn)]
        rows = [row for row in found if row is not None]
        name = str(dtype).removeprefix("torch.")
        if not rows:
            raise Unavailable(f"nothing but dense was chosen in {name}; `sparsetrain doctor --tune` measures first")
        figures = [row.figure for row in rows]
        slower = sum(figure.high < _TARGET.bound for figure in figures)
        gain = float(np.median([figure.median for figure in figures]))
        note = f"{len(rows)} of {drawn} choices were not dense, {slower} of them slower; median gain {gain:.2f}x"
        worst = rows[int(np.argmin([figure.high for figure in figures]))]
        yield replace(worst, name=f"worst choice, {name}: {worst.name}", note=note)


_TARGET = AtLeast(0.98)


def _choice_over_dense(operation: Operation, problem: Problem) -> Row | None:
    """What the dispatcher chooses against dense; None where it chooses dense itself."""
    choice = operation.choose("cpu", problem.dtype, problem.variant, problem.sizes, problem.density)
    if choice.implementation == DENSE:
        return None
    arguments = operation.arguments(problem)
    ours, dense = (partial(operation.implementations[name].run, *arguments) for name in (choice.implementation, DENSE))
    start = time.perf_counter()
    ours()
    dense()
    pairs = int(np.clip(_PAIRS_OF_SHAPE_S / (time.perf_counter() - start), 3, 7))
    sizes = "x".join(map(str, problem.sizes))
    name = f"{operation.name} [{problem.variant}] {sizes}, density {problem.density:.2g}"
    return Row(name, *interleave(ours, dense, pairs=pairs, warmup=0), DENSE, _TARGET)


def _random_linear(random: np.random.Generator, dtype: torch.dtype) -> tuple[Operation, Problem]:
    """Sizes between and around those that were measured."""
    tokens, outputs, inputs = (int(2 ** random.uniform(low, high)) for low, high in ((8, 12), (8, 11.5), (8, 11.5)))
    if random.random() < 0.5:
        block = int(random.choice([32, 64, 128]))
        sizes = tokens, -(-outputs // block) * block, -(-inputs // block) * block
        operation = _one_of(random, _BLOCK_OPERATIONS)
        variant, density = f"{block}x{block}", float(random.uniform(0.06, 1))
    else:
        pattern = NMPattern(1, int(random.choice([2, 4, 8])), int(random.choice([64, 128])))
        sizes = tokens, -(-outputs // pattern.vector) * pattern.vector, -(-inputs // pattern.m) * pattern.m
        operation, variant, density = _one_of(random, _NM_OPERATIONS), str(pattern), pattern.density
    return operation, Problem(operation.name, variant, "cpu", dtype, sizes, density, torch.get_num_threads())


def _random_attention(random: np.random.Generator, dtype: torch.dtype) -> tuple[Operation, Problem]:
    """Short and long sequences, few and many heads, no more scores than dense computes in about half a second."""
    tokens = int(2 ** random.uniform(6.5, 11.5))
    most_heads = max(1, min(64, 2**24 // tokens**2))
    heads, dim = int(random.integers(1, most_heads + 1)), int(random.choice([32, 64, 96, 128]))
    words = [f"block {random.choice([32, 64])}"] + ["causal"] * bool(random.random() < 0.7)
    whole = random.random() < 0.1
    density = 1.0 if whole else float(random.uniform(0.06, 0.99))
    variant = ", ".join(words + ["whole"] * whole)
    operation = _one_of(random, _ATTENTION)
    sizes = heads, tokens, tokens, dim
    return operation, Problem(operation.name, variant, "cpu", dtype, sizes, density, torch.get_num_threads())


def _one_of(random: np.random.Generator, operations: tuple[Operation, ...]) -> Operation:
    return operations[int(random.integers(len(operations)))]

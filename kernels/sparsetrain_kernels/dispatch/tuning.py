"""Measure every implementation of every operation, and keep the times for this hardware."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsetrain_kernels.dispatch.hardware import hardware_name
from sparsetrain_kernels.dispatch.operation import OPERATIONS, Operation, table, use_table
from sparsetrain_kernels.dispatch.table import DENSE, Problem, Table, TableError, own_table

_MIN_ROUNDS = 3
_ENOUGH_S = 0.2
"""Seconds after which a problem is not measured more often than the least."""


@dataclass(frozen=True)
class Tuned:
    """What tuning has done."""

    table: Table
    path: Path
    """Where the table was written."""
    measured: int
    """Problems that were measured."""
    wanted: int
    """Problems that there are."""


def tune(
    device: str = "cpu",
    operations: Iterable[str] | None = None,
    *,
    repeats: int = 7,
    limit_s: float = float("inf"),
    report: Callable[[str, int, int], None] = lambda line, done, wanted: None,
) -> Tuned:
    """Measure, write the table to `own_table(hardware_name(device))` and choose from it from now on.

    Problems come in random order, so that a limit leaves a sample of all; what was known of the others stays.

    Args:
        device: cpu or cuda.
        operations: Names of operations, or what names begin with; None: all that are registered.
        repeats: The most rounds in which the implementations of a problem take turns; medians are kept.
        limit_s: Seconds after which no further problem is begun.
        report: Called after each problem with a line about it, problems measured, and problems that there are.

    Raises:
        ValueError: No operation has such a name.
    """
    problems = [(name, problem) for name in _named(operations) for problem in OPERATIONS[name].measured(device)]
    random.Random(0).shuffle(problems)
    hardware = hardware_name(device)
    tuned = Table(hardware, _known(device))
    end, done = time.monotonic() + limit_s, 0
    for name, problem in problems:
        if time.monotonic() > end:
            break
        tuned.times[problem] = measure(OPERATIONS[name], problem, repeats)
        done += 1
        report(_line(problem, tuned.times[problem]), done, len(problems))
    path = own_table(hardware)
    tuned.write(path)
    use_table(device, tuned)
    return Tuned(tuned, path, done, len(problems))


def measure(operation: Operation, problem: Problem, repeats: int) -> dict[str, float]:
    """Median seconds of each implementation that can compute the problem, taken in turns after one round to warm up."""
    arguments = operation.arguments(problem)
    runs = {name: operation.implementations[name].run for name in (DENSE, *operation.candidates(problem))}
    for run in runs.values():
        _seconds(run, arguments, problem.device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + _ENOUGH_S
    for round_ in range(repeats):
        if round_ >= _MIN_ROUNDS and time.monotonic() > end:
            break
        for name, run in runs.items():
            samples[name].append(_seconds(run, arguments, problem.device))
    return {name: median(seconds) for name, seconds in samples.items()}


def _named(operations: Iterable[str] | None) -> list[str]:
    if operations is None:
        return sorted(OPERATIONS)
    found = {wanted: [name for name in sorted(OPERATIONS) if name.startswith(wanted)] for wanted in operations}
    if unknown := [wanted for wanted, names in found.items() if not names]:
        raise ValueError(f"operations={unknown}: not registered; there are {', '.join(sorted(OPERATIONS))}")
    return sorted({name for names in found.values() for name in names})


def _known(device: str) -> dict[Problem, dict[str, float]]:
    """Times in the table in use; none where it cannot be read, as it is about to be replaced."""
    try:
        return dict(table(device).times)
    except TableError:
        return {}


def _seconds(run: Callable[..., Any], arguments: Iterable[Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _line(problem: Problem, times: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in times.items())
    dtype = str(problem.dtype).removeprefix("torch.")
    sizes = "x".join(map(str, problem.sizes))
    return f"{problem.operation} [{problem.variant}] {dtype} {sizes}, density {problem.density:.3g}: {shown}"

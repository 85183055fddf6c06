"""Measure every implementation of every operation, and keep the times for this hardware."""

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

from sparsetrain_kernels.dispatch.hardware import hardware_name
from sparsetrain_kernels.dispatch.operation import OPERATIONS, Operation, table, use_table
from sparsetrain_kernels.dispatch.table import DENSE, Problem, Table, own_table


def tune(
    device: str = "cpu",
    operations: Iterable[str] | None = None,
    *,
    repeats: int = 7,
    report: Callable[[str], None] = lambda line: None,
) -> Table:
    """Measure, write the table to `own_table(hardware_name(device))` and choose from it from now on.

    Args:
        device: cpu or cuda.
        operations: Names of operations; None: all that are registered. Times of others are kept.
        repeats: Rounds in which the implementations of a problem take turns; medians are kept.
        report: Called with a line for each measured problem.

    Returns:
        The new table.

    Raises:
        ValueError: No operation has one of these names.
    """
    names = sorted(OPERATIONS) if operations is None else list(operations)
    if unknown := sorted(set(names) - set(OPERATIONS)):
        raise ValueError(f"operations={unknown}: not registered; there are {', '.join(sorted(OPERATIONS))}")
    hardware = hardware_name(device)
    kept = {problem: times for problem, times in table(device).times.items() if problem.operation not in names}
    tuned = Table(hardware, kept)
    for name in names:
        for problem in OPERATIONS[name].measured(device):
            tuned.times[problem] = measure(OPERATIONS[name], problem, repeats)
            report(_line(problem, tuned.times[problem]))
    tuned.write(own_table(hardware))
    use_table(device, tuned)
    return tuned


def measure(operation: Operation, problem: Problem, repeats: int) -> dict[str, float]:
    """Median seconds of each implementation that can compute the problem, taken in turns."""
    arguments = operation.arguments(problem)
    runs = {name: operation.implementations[name].run for name in (DENSE, *operation.candidates(problem))}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            samples[name].append(_seconds(run, arguments, problem.device))
    return {name: median(seconds[1:]) for name, seconds in samples.items()}


def _seconds(run: Callable[..., Any], arguments: Iterable[Any], device: str) -> float:
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

"""Timing in interleaved pairs, and bootstrap confidence intervals.

On a shared machine absolute times drift by tens of percent; two things that run right after each other see the same
weather, so the ratio within a pair is what is trusted.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % confidence interval."""

    median: float
    low: float
    high: float


def interleave(
    ours: Callable[[], object], peer: Callable[[], object], *, pairs: int, warmup: int = 2
) -> tuple[list[float], list[float]]:
    """Time two callables in turns, ours first in even pairs and second in odd ones.

    Returns:
        Seconds of each call of `ours` and of `peer`; entries of the same index were measured right after each other.
    """
    for _ in range(warmup):
        ours()
        peer()
    ours_s, peer_s = [], []
    for pair in range(pairs):
        if pair % 2 == 0:
            ours_s.append(seconds(ours))
            peer_s.append(seconds(peer))
        else:
            peer_s.append(seconds(peer))
            ours_s.append(seconds(ours))
    return ours_s, peer_s


def interleave_ranks(
    ours: Callable[[], object], peer: Callable[[], object], *, pairs: int, warmup: int = 2
) -> tuple[list[float], list[float]]:
    """As `interleave`, of steps that all ranks of the default group take together: each lasts until the last is done.

    Returns:
        Seconds, nearly the same on every rank.
    """

    def until_all_are_done(step: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            step()
            dist.barrier()

        return call

    dist.barrier()
    return interleave(until_all_are_done(ours), until_all_are_done(peer), pairs=pairs, warmup=warmup)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, including the GPU work that it queued."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over pairs of numerator ÷ denominator, with its bootstrap interval.

    Raises:
        ValueError: The two have different lengths.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} samples cannot be paired with {len(denominator)}")
    return median_interval(np.divide(numerator, denominator).tolist())


def median_interval(samples: Sequence[float], *, resamples: int = 10_000) -> Interval:
    """Median with its percentile bootstrap interval; seeded, so equal samples give equal intervals."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no samples")
    drawn = np.random.default_rng(0).choice(values, (resamples, values.size))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Interval(float(np.median(values)), float(low), float(high))

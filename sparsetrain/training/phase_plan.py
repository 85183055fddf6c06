"""How a phase's tokens become steps: the size of every batch, and where in the data it begins."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config import BatchRamp, PhaseConfig, RunConfig


@dataclass(frozen=True)
class Segment:
    """A run of steps with one batch size."""

    num_steps: int
    samples_per_step: int


@dataclass(frozen=True)
class PhasePlan:
    """The steps of one phase."""

    index: int
    phase: PhaseConfig
    segments: tuple[Segment, ...]
    first_step: int
    """Steps of all phases before this one."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the phase."""
        return sum(segment.num_steps for segment in self.segments)

    @property
    def seq_len(self) -> int:
        """Tokens a sample."""
        return self.phase.data.seq_len

    @property
    def num_tokens(self) -> int:
        """Tokens of the phase: those asked for, rounded up to whole steps."""
        return self.first_sample(self.num_steps) * self.seq_len

    def samples_in_step(self, step: int) -> int:
        """Global batch of a step of the phase (from 0), in samples."""
        return self.segments[self._segment_of(step)].samples_per_step

    def first_sample(self, step: int) -> int:
        """Samples of the phase before a step, which is the global index of that step's first sample."""
        segment = self._segment_of(step)
        first_step, first_sample = self._starts[segment]
        return first_sample + (step - first_step) * self.segments[segment].samples_per_step

    def tokens_per_step(self) -> NDArray[np.int64]:
        """Tokens of every step, int64 of [num_steps]."""
        samples = [np.full(segment.num_steps, segment.samples_per_step) for segment in self.segments]
        return np.concatenate(samples).astype(np.int64) * self.seq_len

    @cached_property
    def _starts(self) -> Sequence[tuple[int, int]]:
        """First step and first sample of every segment."""
        sizes = [(segment.num_steps, segment.num_steps * segment.samples_per_step) for segment in self.segments]
        return list(itertools.accumulate(sizes[:-1], lambda a, b: (a[0] + b[0], a[1] + b[1]), initial=(0, 0)))

    def _segment_of(self, step: int) -> int:
        return bisect_right(self._starts, step, key=lambda start: start[0]) - 1


def plan_phases(config: RunConfig) -> list[PhasePlan]:
    """Lay out every phase of a run; the batch ramp belongs to the first."""
    plans: list[PhasePlan] = []
    first_step = 0
    for index, phase in enumerate(config.phases):
        ramp = config.train.batch_ramp if index == 0 else None
        plan = PhasePlan(index, phase, _segments(phase, config.train.batch_tokens, ramp), first_step)
        plans.append(plan)
        first_step += plan.num_steps
    return plans


def _segments(phase: PhaseConfig, batch_tokens: int, ramp: BatchRamp | None) -> tuple[Segment, ...]:
    seq_len = phase.data.seq_len
    full = batch_tokens // seq_len
    left = -(-phase.tokens // seq_len)
    segments = []
    if ramp is not None:
        increment = ramp.start_tokens // seq_len
        sizes = range(increment, full, increment)
        share = ramp.over * left / max(1, len(sizes))
        for size in sizes:
            # Every size gets an equal share of the ramp's tokens, and no more than there are.
            num_steps = min(-(-int(share) // size), -(-left // size))
            if num_steps > 0:
                segments.append(Segment(num_steps, size))
                left -= num_steps * size
    if left > 0:
        segments.append(Segment(-(-left // full), full))
    return tuple(segments)

"""Seconds that a device spends on rows of experts, without making it wait."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up measured spans and what was done in them.

    Args:
        device: Whose time. Spans on a GPU are measured by events of the stream and read when they have passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self.amount = 0
        """What was done in all spans."""

    @contextlib.contextmanager
    def measure(self, amount: int) -> Iterator[None]:
        """Time what is done inside."""
        self.amount += amount
        if self._is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Of all spans; on a GPU this waits for the last one."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return self._seconds

    def take(self) -> tuple[float, int]:
        """Seconds and amount so far, to begin anew."""
        taken = self.seconds, self.amount
        self._seconds, self.amount = 0.0, 0
        return taken

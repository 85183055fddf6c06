"""Seconds that a device spends on parts of a step, without making it wait."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Adds up measured spans and what was done in them.

    Args:
        device: Whose time. Spans on a GPU are measured by events of the stream and read when they have passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        self.amount = 0
        """What was done in all spans."""

    def start(self) -> None:
        """Begin a span; one that was begun before and not stopped is forgotten."""
        self._began = self._now()

    def stop(self, amount: int = 0) -> None:
        """End the span; nothing happens where none was begun."""
        if self._began is not None:
            self._spans.append((self._began, self._now()))
            self._began = None
            self.amount += amount

    @contextlib.contextmanager
    def measure(self, amount: int) -> Iterator[None]:
        """Time what is done inside."""
        began = self._now()
        yield
        self._spans.append((began, self._now()))
        self.amount += amount

    def take(self) -> tuple[float, int]:
        """Seconds and amount so far, to begin anew; on a GPU this waits for the last span."""
        seconds = 0.0
        for began, ended in self._spans:
            if isinstance(began, float):
                seconds += ended - began
            else:
                ended.synchronize()
                seconds += began.elapsed_time(ended) / 1000
        taken = seconds, self.amount
        self._spans, self.amount = [], 0
        return taken

    def _now(self) -> Any:
        """A moment: seconds on a CPU, on a GPU an event."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

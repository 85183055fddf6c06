"""Events as lines of text in a job's output, so that whoever follows the job sees the display of a run at home.

A line is a record separator, a JSON object and a newline (RFC 7464), which no line for people begins with.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparsetrain.training.events import (
    CheckpointSaved,
    DataProgress,
    EvalDone,
    Event,
    Notice,
    PhaseStarted,
    RunFinished,
    RunStarted,
    StepDone,
)

_MARK = "\x1e"
_STEP_EVERY_S = 0.25
_KINDS: dict[str, Callable[..., Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        PhaseStarted,
        StepDone,
        EvalDone,
        CheckpointSaved,
        Notice,
        DataProgress,
        RunFinished,
    )
}


class EventLineWriter:
    """Reporter that writes each event as a line.

    Of steps and of data only the newest is written, a few times a second: a display shows no more, and the log of a
    long run stays small.

    Args:
        write: Takes one complete line.
        clock: Seconds from any origin.
    """

    def __init__(self, write: Callable[[str], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._written_at = -_STEP_EVERY_S
        self._held_back: Event | None = None

    def __call__(self, event: Event) -> None:
        """Write an event, after the step that was held back before it."""
        if isinstance(event, StepDone | DataProgress):
            if self._held_back is not None and type(self._held_back) is not type(event):
                self._write_held_back()
            self._held_back = event
            if self._clock() - self._written_at >= _STEP_EVERY_S:
                self._write_held_back()
            return
        self._write_held_back()
        self._write_line(event)

    def _write_held_back(self) -> None:
        if self._held_back is not None:
            self._write_line(self._held_back)
            self._held_back = None
            self._written_at = self._clock()

    def _write_line(self, event: Event) -> None:
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        self._write(f"{_MARK}{json.dumps({'event': type(event).__name__, **fields}, default=_plain)}\n")


class EventLineReader:
    """Takes a job's output apart again, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, piece: str) -> Iterator[Event | str]:
        """Yield the events and the other lines (without their newline) that are complete now."""
        *lines, self._rest = (self._rest + piece).split("\n")
        for line in lines:
            yield _read_line(line)

    def end(self) -> Iterator[Event | str]:
        """Yield the last line, which has no newline."""
        if self._rest:
            yield _read_line(self._rest)
        self._rest = ""


def _read_line(line: str) -> Event | str:
    if not line.startswith(_MARK):
        return line
    try:
        fields = json.loads(line.removeprefix(_MARK))
        return _KINDS[fields.pop("event")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError):  # cut short, or of another version: shown as it is
        return line.removeprefix(_MARK)


def _plain(value: Any) -> Any:
    """What JSON has no word for: mappings that are no dict, and numbers of numpy or torch."""
    return value.item() if hasattr(value, "item") else dict(value)

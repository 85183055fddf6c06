import math
from types import MappingProxyType

import numpy as np
import pytest

from sparsetrain.cluster.event_lines import EventLineReader, EventLineWriter
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

EVENTS: list[Event] = [
    Notice("Füße\n\x1e{", level="warning"),
    DataProgress("tokens", 3, None),
    RunStarted("run", "/runs/run", 10, 20, 2, "cpu", 1e9, active_parameters=5),
    PhaseStarted("pretrain", 0, 1, 0, 5, 20, "dense"),
    StepDone("pretrain", {"step": 1, "loss": 2.5}),
    EvalDone("pretrain", 1, "end", 2.5, 1.5, 100),
    CheckpointSaved(1, "/runs/run/checkpoints/1", 0.5),
    RunFinished({"final_loss": 2.5, "phases": [{"name": "pretrain"}]}),
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_come_back_from_pieces_of_any_size_amid_other_lines(size: int) -> None:
    text: list[str] = ["Running entrypoint\n"]
    writer = EventLineWriter(text.append)
    for event in EVENTS:
        writer(event)
    text.append("{not an event}\n\nlast")
    whole = "".join(text)
    reader = EventLineReader()
    read = [line for at in range(0, len(whole), size) for line in reader.feed(whole[at : at + size])]
    assert [*read, *reader.end()] == ["Running entrypoint", *EVENTS, "{not an event}", "", "last"]
    assert list(reader.end()) == []


def test_of_steps_only_the_newest_is_written_and_never_after_what_follows_it() -> None:
    lines: list[str] = []
    clock = Clock()
    writer = EventLineWriter(lines.append, clock=clock)
    for step in range(1, 101):
        writer(StepDone("pretrain", MappingProxyType({"step": step})))
        clock.now += 0.01
    writer(RunFinished({}))
    events = list(EventLineReader().feed("".join(lines)))
    steps = [event.row["step"] for event in events if isinstance(event, StepDone)]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert 4 <= len(steps) <= 6
    assert isinstance(events[-1], RunFinished)


def test_numbers_of_numpy_and_losses_that_are_not_numbers_pass() -> None:
    lines: list[str] = []
    EventLineWriter(lines.append)(StepDone("pretrain", {"loss": np.float32(0.5), "grad_norm": math.inf}))
    (event,) = EventLineReader().feed(lines[0])
    assert event == StepDone("pretrain", {"loss": 0.5, "grad_norm": math.inf})


@pytest.mark.parametrize("line", ['{"event": "StepDone"', '{"event": "Elsewhere"}', '{"event": "Notice", "x": 1}', "1"])
def test_a_line_that_is_damaged_or_of_another_version_is_shown_as_it_is(line: str) -> None:
    assert list(EventLineReader().feed(f"\x1e{line}\n")) == [line]

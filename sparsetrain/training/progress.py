"""The progress of a run: a live display on a terminal, sparse plain lines anywhere else."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console

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
from sparsetrain.training.formatting import duration, percent, step_figures
from sparsetrain.training.live_view import LiveView
from sparsetrain.training.progress_state import (
    ProgressState,
    describe_data,
    describe_end,
    describe_evaluation,
    describe_run,
)

_LINES_A_RUN = 50
_LINE_EVERY_S = 10.0


class View(Protocol):
    """Shows a ProgressState to somebody."""

    def start(self) -> None:
        """Begin to show."""

    def show(self, event: Event) -> None:
        """Show what the event, which the state has taken in, has changed."""

    def stop(self) -> None:
        """Leave everything as a terminal or log file should look afterwards."""


class ProgressDisplay:
    """Shows a run's events: live on a terminal, as plain lines elsewhere.

    with ProgressDisplay() as display:
        train(config, reporter=display)

    Args:
        console: Where to draw; default the standard output.
        clock: Seconds from any origin, for the time left.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        console = console or Console()
        self._state = ProgressState(clock)
        self._notices: set[str] = set()
        self._view: View
        # FORCE_COLOR makes rich call any pipe a terminal, and a log file of cursor movements helps nobody.
        if console.is_interactive and console.file.isatty():
            self._view = LiveView(console, self._state)
        else:
            self._view = PlainView(console, self._state)

    def __enter__(self) -> Self:
        self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.stop()

    def __call__(self, event: Event) -> None:
        """Take in and show one event; a notice that has been shown is not shown again."""
        if isinstance(event, Notice):
            if event.message in self._notices:
                return
            self._notices.add(event.message)
        self._state.take(event)
        self._view.show(event)

    def data_progress(self, stage: str, done: int, total: int | None) -> None:
        """Show how far token shards are; made to be the on_progress of data.prepare."""
        self(DataProgress(stage, done, total))


class PlainView:
    """One line for what matters, none of it twice, no control codes: for log files and pipes."""

    def __init__(self, console: Console, state: ProgressState) -> None:
        self._console = console
        self._state = state
        self._last_line = -_LINE_EVERY_S
        self._last_slot = -1
        self._data_stage = ""

    def start(self) -> None:
        """Nothing is shown before the first event."""

    def stop(self) -> None:
        """Every line is complete as soon as it is printed."""

    def show(self, event: Event) -> None:
        """Print the event's line; of steps and data, only one now and then."""
        match event:
            case RunStarted():
                self._print(f"{event.name}: {describe_run(event)}")
            case PhaseStarted():
                self._last_slot = -1
                self._print(f"phase {event.index + 1} of {event.num_phases}, {event.name}: {event.summary}")
            case StepDone():
                self._show_step(event)
            case EvalDone():
                self._print(f"held out at step {event.step}: {describe_evaluation(event)}")
            case CheckpointSaved():
                self._print(f"checkpoint at step {event.step} ({event.seconds:.1f} s)")
            case DataProgress():
                self._show_data(event)
            case Notice():
                self._print(f"warning: {event.message}" if event.level == "warning" else event.message)
            case RunFinished():
                self._print(describe_end(self._state))

    def _show_step(self, event: StepDone) -> None:
        state = self._state
        is_last = state.share_done >= 1.0
        slot = state.tokens * _LINES_A_RUN // state.run.total_tokens if state.run else 0
        if slot == self._last_slot and not is_last and not self._is_time():
            return
        self._last_slot = slot
        figures = ", ".join(f"{label} {value}" for label, value in step_figures(event.row))
        left = "" if state.seconds_left is None or is_last else f", {duration(state.seconds_left)} left"
        self._print(f"step {event.row['step']} ({percent(state.share_done, 0)}): {figures}{left}")

    def _show_data(self, event: DataProgress) -> None:
        is_done = event.total is not None and event.done >= event.total
        if event.stage == self._data_stage and not is_done and not self._is_time():
            return
        self._data_stage = event.stage
        self._print(f"data, {event.stage}: {describe_data(event)}")

    def _is_time(self) -> bool:
        """Every ten seconds at first; on a long run once per fiftieth of the time it has taken so far."""
        now = self._state.clock()
        return now - self._last_line >= max(_LINE_EVERY_S, (now - self._state.began) / _LINES_A_RUN)

    def _print(self, line: str) -> None:
        self._last_line = self._state.clock()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

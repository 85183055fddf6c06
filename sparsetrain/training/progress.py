"""The progress of a run: a live display on a terminal, sparse plain lines anywhere else."""

import time
from collections import deque
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
from sparsetrain.training.formatting import duration, percent, quantity, scaled, step_figures

_PACE_STEPS = 200
_LINES_A_RUN = 50
_LINE_EVERY_S = 10.0


class RunState:
    """What is known of a run from the events so far.

    Args:
        clock: Seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.run: RunStarted | None = None
        self.phase: PhaseStarted | None = None
        self.step: StepDone | None = None
        self.evaluation: EvalDone | None = None
        self.evaluation_at_start: EvalDone | None = None
        self.checkpoint: CheckpointSaved | None = None
        self.data: DataProgress | None = None
        self.is_finished = False
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_STEPS)

    def take(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case RunStarted():
                self.run, self.data = event, None
                self._pace.clear()
            case PhaseStarted():
                self.phase, self.data, self.evaluation_at_start = event, None, None
            case StepDone():
                self.step, self.data = event, None
                self._pace.append((self.clock(), self.tokens))
            case EvalDone():
                self.evaluation = event
                if event.when == "start":
                    self.evaluation_at_start = event
            case CheckpointSaved():
                self.checkpoint = event
            case DataProgress():
                self.data = event
            case RunFinished():
                self.is_finished = True
            case Notice():
                pass

    @property
    def tokens(self) -> int:
        """Training tokens so far, over all phases."""
        return int(self.step.row["tokens"]) if self.step else 0

    @property
    def share_done(self) -> float:
        """Share of the run's tokens that are done."""
        return min(1.0, self.tokens / self.run.total_tokens) if self.run else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the pace of the last steps, evaluations and checkpoints among them included."""
        if self.run is None or len(self._pace) < 2:
            return None
        (earlier, tokens_then), (later, tokens_now) = self._pace[0], self._pace[-1]
        if later <= earlier or tokens_now <= tokens_then:
            return None
        return max(0, self.run.total_tokens - tokens_now) * (later - earlier) / (tokens_now - tokens_then)


class View(Protocol):
    """Shows a RunState to somebody."""

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
        self._state = RunState(clock)
        self._notices: set[str] = set()
        self._view: View
        # FORCE_COLOR makes rich call any pipe a terminal, and a log file of cursor movements helps nobody.
        if console.is_interactive and console.file.isatty():
            from sparsetrain.training.live_view import LiveView

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

    def __init__(self, console: Console, state: RunState) -> None:
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


def describe_run(run: RunStarted) -> str:
    """What is trained, on what, and where it is kept."""
    facts = [
        f"{scaled(run.num_parameters)} parameters",
        f"{scaled(run.total_tokens)} tokens",
        f"{run.device} at {quantity(run.matmul_peak_flops, 'FLOP/s')}",
        run.folder,
    ]
    if run.resumed_from_step is not None:
        facts.append(f"resumed from step {run.resumed_from_step}")
    return " · ".join(facts)


def describe_evaluation(event: EvalDone) -> str:
    """Bits per byte, loss and perplexity of one evaluation."""
    return f"{event.bits_per_byte:.3f} bits/byte · loss {event.loss:.3f} · perplexity {scaled(event.perplexity)}"


def describe_data(event: DataProgress) -> str:
    """How many bytes are done."""
    done = quantity(event.done, "B")
    return done if event.total is None else f"{done} of {quantity(event.total, 'B')}"


def describe_end(state: RunState) -> str:
    """One line about a run that has finished."""
    return f"finished: {scaled(state.tokens)} tokens in {duration(state.clock() - state.began)}"

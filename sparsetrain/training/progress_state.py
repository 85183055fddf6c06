"""What is known of a run from its events, and the words for it: what every display of its progress shares."""

import time
from collections import deque
from collections.abc import Callable

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
from sparsetrain.training.formatting import duration, quantity, scaled

_PACE_STEPS = 200


class ProgressState:
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


def describe_run(run: RunStarted) -> str:
    """What is trained, on what, and where it is kept."""
    active = f", {scaled(run.active_parameters)} active" if run.active_parameters is not None else ""
    facts = [
        f"{scaled(run.num_parameters)} parameters{active}",
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


def describe_end(state: ProgressState) -> str:
    """One line about a run that has finished."""
    return f"finished: {scaled(state.tokens)} tokens in {duration(state.clock() - state.began)}"

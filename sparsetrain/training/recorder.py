"""Where a run's figures go: the run folder's files, and whoever watches. Rank 0 writes; the others keep silent."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.parallel import World
from sparsetrain.training.events import EvalDone, Event, Reporter, StepDone
from sparsetrain.training.metrics import MetricsWriter
from sparsetrain.training.state import RunState


class Recorder:
    """Takes events on every rank and records them once."""

    def __init__(self, metrics: MetricsWriter | None, reporter: Reporter | None) -> None:
        self._metrics = metrics
        self._reporter = reporter

    def __call__(self, event: Event) -> None:
        """Record an event; raises RunFolderError where the disk is full."""
        if self._metrics is not None:
            match event:
                case StepDone():
                    self._metrics.step(event.row)
                case EvalDone():
                    self._metrics.evaluation(event)
        if self._reporter is not None:
            self._reporter(event)


@contextlib.contextmanager
def record(folder: Path, world: World, reporter: Reporter | None, state: RunState) -> Iterator[Recorder]:
    """Open the run folder's metrics on rank 0; rows of steps that a resumed run does again are removed."""
    if not world.is_main:
        yield Recorder(None, None)
        return
    with MetricsWriter(folder, state.step if state.resumed else None) as metrics:
        yield Recorder(metrics, reporter)

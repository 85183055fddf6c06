"""Where a run's figures go: the run folder's files, and whoever watches. Rank 0 writes; the others keep silent."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.config import RunConfig
from sparsetrain.parallel import MoEReport, World
from sparsetrain.training.events import EvalDone, Event, Reporter, StepDone
from sparsetrain.training.expert_trace import ExpertTrace
from sparsetrain.training.metrics import MetricsWriter
from sparsetrain.training.state import RunState


class Recorder:
    """Takes events on every rank and records them once."""

    def __init__(
        self, metrics: MetricsWriter | None = None, reporter: Reporter | None = None, trace: ExpertTrace | None = None
    ) -> None:
        self._metrics = metrics
        self._reporter = reporter
        self._trace = trace

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

    def before_checkpoint(self) -> None:
        """Make sure that a run which goes on from a checkpoint finds the loads of the steps before it."""
        if self._trace is not None:
            self._trace.save()

    def expert_load(self, step: int, report: MoEReport | None) -> None:
        """Record the load of each expert in a step, if there are any."""
        if self._trace is not None and report is not None:
            self._trace.append(step, report.load_LE)


@contextlib.contextmanager
def record(
    folder: Path, config: RunConfig, world: World, reporter: Reporter | None, state: RunState
) -> Iterator[Recorder]:
    """Open the run folder's metrics on rank 0; rows of steps that a resumed run does again are removed."""
    if not world.is_main:
        yield Recorder()
        return
    resume_step = state.step if state.resumed else None
    trace = None if config.model.moe is None else ExpertTrace(folder, config.model.moe.top_k, resume_step)
    with MetricsWriter(folder, resume_step) as metrics:
        yield Recorder(metrics, reporter, trace)

"""The load of a run's experts, kept in its folder: expert_load.npz, which a picture shows and a router can replay.

Shapes: L MoE layers, E experts.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.moe.placement.topology import IntArray

TRACE_FILE = "expert_load.npz"

_MAX_NUMBERS = 2**23
"""Loads that are kept, 64 MiB of them: of a longer run every second step is left out, then every second of those."""


class ExpertTrace:
    """Collects the load of every step; `save` it before each checkpoint, so that a resumed run finds it.

    Args:
        folder: The run folder.
        top_k: Experts of a token.
        resume_step: Last step of the checkpoint that the run resumes from: loads of later steps are dropped, because
            they come again. None: the run starts from nothing.

    Raises:
        PlacementError: A resumed run's recorded load is damaged, or of another model.
    """

    def __init__(self, folder: Path, top_k: int, resume_step: int | None) -> None:
        self._path = Path(folder) / TRACE_FILE
        self._top_k = top_k
        self._stride = 1
        self._steps: list[int] = []
        self._loads: list[IntArray] = []
        if resume_step is not None and self._path.is_file():
            self._go_on(self._read(), resume_step)

    def append(self, step: int, load_LE: ArrayLike) -> None:
        """Take in the load of an optimizer step: int [L, E], rows of each expert, summed over all ranks.

        Raises:
            PlacementError: The load is of another shape than those before.
        """
        load = np.array(load_LE, dtype=np.int64)
        if self._loads and load.shape != self._loads[0].shape:
            raise PlacementError(
                f"{self._path} holds loads of {self._loads[0].shape} layers and experts, and this model has "
                f"{load.shape}: it belongs to another run, remove it"
            )
        if step % self._stride:
            return
        self._steps.append(step)
        self._loads.append(load)
        while len(self._loads) > 1 and len(self._loads) * load.size > _MAX_NUMBERS:
            self._thin()

    def save(self) -> None:
        """Write what there is into the run folder, whole or not at all.

        Raises:
            PlacementError: The file cannot be written.
        """
        if self._steps:
            LoadTrace(np.array(self._steps, dtype=np.int64), np.stack(self._loads), self._top_k).save(self._path)

    def _read(self) -> LoadTrace:
        try:
            return LoadTrace.load(self._path)
        except PlacementError as error:
            raise PlacementError(f"{error}; remove it to go on without the loads of earlier steps") from error

    def _go_on(self, trace: LoadTrace, resume_step: int) -> None:
        kept = trace.step_N <= resume_step
        self._steps = trace.step_N[kept].tolist()
        self._loads = list(trace.load_NLE[kept])
        if len(self._steps) > 1:
            self._stride = int(np.diff(self._steps).min())

    def _thin(self) -> None:
        self._stride *= 2
        kept = [place for place, step in enumerate(self._steps) if step % self._stride == 0]
        self._steps = [self._steps[place] for place in kept]
        self._loads = [self._loads[place] for place in kept]

"""When a run saves, what it saves, and how it goes on from there."""

import time
from collections.abc import Callable
from pathlib import Path

from sparsetrain.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    load_weights,
    open_weights,
    optimizer_state,
    read_state,
    save_checkpoint,
)
from sparsetrain.checkpoint.agreement import on_every_rank
from sparsetrain.config import RunConfig
from sparsetrain.engines import Engine
from sparsetrain.moe.upcycle import Diversity, upcycle_
from sparsetrain.training.events import CheckpointSaved, Notice
from sparsetrain.training.sparse_phase import PhaseSparsity
from sparsetrain.training.state import RunState


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are kept.
        config: The run.
        engine: Whose weights and moments they hold.
        sparsity: Whose masks they hold.
    """

    def __init__(self, folder: Path, config: RunConfig, engine: Engine, sparsity: PhaseSparsity) -> None:
        self._folder = folder
        self._config = config
        self._engine = engine
        self._sparsity = sparsity
        self.notices: list[Notice] = []
        """What a person should know of how the run began; filled on rank 0."""

    def resume_or_start(self, begin_phase: Callable[[int], object]) -> RunState:
        """Go on from the newest intact checkpoint; or begin, from the weights that train.init_from names if it does.

        Collective.

        Args:
            begin_phase: Gives engine and masks what the phase of this index begins with.

        Raises:
            CheckpointError: No checkpoint is intact, or its weights are not those of this model.
        """
        latest = latest_checkpoint(self._folder, on_damaged=self._warn)
        if latest is not None:
            return self._resume(latest, begin_phase)
        if self._config.train.init_from is not None:
            self._start_from(Path(self._config.train.init_from))
        return RunState.fresh(len(self._config.phases))

    def save(self, state: RunState) -> CheckpointSaved:
        """Save everything that the next step depends on; collective."""
        began = time.perf_counter()
        path = save_checkpoint(
            self._folder,
            state.step,
            shards=self._engine.weight_shards(),
            masks=self._sparsity.masks(),
            state={
                "run": state.to_dict(),
                "optimizer": optimizer_state(self._engine.optimizer),
                "sparsity": self._sparsity.current.state_dict(),
                "experts": None if (experts := self._engine.experts) is None else experts.state_dict(),
            },
            keep=self._config.checkpoint.keep,
        )
        return CheckpointSaved(state.step, str(path), time.perf_counter() - began)

    def _resume(self, path: Path, begin_phase: Callable[[int], object]) -> RunState:
        saved = read_state(path)
        state = RunState.from_dict(saved["run"])
        state.resumed = True
        inside = state.phase_step > 0
        if inside:
            begin_phase(state.phase)  # on weights that do not matter: the checkpoint's replace them
        load_optimizer_state(self._engine.optimizer, saved["optimizer"])
        if self._engine.experts is not None and saved["experts"] is not None:
            self._engine.experts.load_state_dict(saved["experts"])  # owners first: they say where weights belong
        checkpoint = load_checkpoint(path, shards=self._engine.weight_shards())
        if inside:
            self._sparsity.restore(checkpoint.masks, saved["sparsity"])
        else:
            self._sparsity.inherit(checkpoint.masks)
        return state

    def _start_from(self, path: Path) -> None:
        """Take the weights of another run, or make experts of its feed-forward layers; collective."""
        upcycle = self._config.train.upcycle
        if upcycle is None:
            source = load_weights(path, self._engine.weight_shards(), on_damaged=self._warn)
            self.notices.append(Notice(f"weights from {source}"))
            return
        weights = open_weights(path, on_damaged=self._warn)
        diversity = Diversity(upcycle.noise, upcycle.mask, self._config.seed)
        shards = self._engine.weight_shards()
        on_every_rank(lambda: upcycle_(self._engine.module, weights.read, diversity, shards=shards))
        self.notices.append(Notice(f"weights upcycled from {weights.path}"))

    def _warn(self, problem: str) -> None:
        self.notices.append(Notice(problem, "warning"))

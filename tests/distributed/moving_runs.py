"""Runs that stop in the middle, go on elsewhere, and must come to the same as one that never did."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from sparsetrain.checkpoint import list_checkpoints
from sparsetrain.config import RunConfig
from sparsetrain.testing import assert_close
from sparsetrain.testing.megatron_cpu import megatron_on_cpu
from sparsetrain.training import train
from tests.training_runs import rows_of


class Interrupted(Exception):
    """Stands for whatever ends a rank in the middle of a run."""


def train_until(config: RunConfig, step: int, **options: Any) -> None:
    """Train, and stop inside a step as a group does when one of its processes dies."""
    from sparsetrain.training import loop

    genuine = loop.train_step

    def stopping(*args: Any) -> Any:
        result = genuine(*args)
        if args[5].step == step:
            raise Interrupted
        return result

    loop.train_step = stopping
    try:
        train(config, **options)
    finally:
        loop.train_step = genuine


def train_pieces(pieces: Iterable[tuple[RunConfig, int | None]]) -> None:
    """Each piece goes on with a run until its step, or without one to the end."""
    for config, step in pieces:
        with megatron_on_cpu() if config.parallel.engine == "megatron" else nullcontext():
            if step is None:
                train(config, on_existing="resume")
            else:
                with pytest.raises(Interrupted):
                    train_until(config, step=step, on_existing="resume")


def beside(folder: Path, name: str) -> Path:
    """A folder that shares the corpus of another."""
    new = folder / name
    new.mkdir()
    (new / "corpus").symlink_to(folder / "corpus")
    return new


def saved_tensors(output: Path, index: int = -1) -> dict[str, torch.Tensor]:
    """Every weight, moment and mask of a run's last checkpoint, or another one of its, whole."""
    tensors: dict[str, torch.Tensor] = {}
    checkpoint = list_checkpoints(output / "checkpoints")[index]
    _load_state_dict(
        tensors, storage_reader=FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return tensors


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same metrics in every step, and the same weights, moments and masks in the end, but for rounding."""
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 1e-3), ("density", 0.0)):
        expected = [row[key] for row in rows_of(wanted)]
        assert [row[key] for row in rows_of(found)] == pytest.approx(expected, rel=tolerance), key
    ours, theirs = saved_tensors(found), saved_tensors(wanted)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer/") for key in theirs)
    for key, tensor in theirs.items():
        assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)

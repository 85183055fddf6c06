"""Load a checkpoint into any layout, after making sure that it is whole and belongs to this model."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.checkpoint.agreement import on_every_rank, on_first_rank, rank, world_size
from sparsetrain.checkpoint.folder import (
    STATE_FILE,
    DamagedCheckpointError,
    Manifest,
    checkpoints_in,
    list_checkpoints,
    rank_file,
    verify_files,
)
from sparsetrain.checkpoint.masks import PackedRows
from sparsetrain.checkpoint.rng import derive_rng_state, set_rng_state
from sparsetrain.checkpoint.save import has_own_master
from sparsetrain.checkpoint.tensors import GlobalTensor, load_tensors, saved_shapes, shard_tensor
from sparsetrain.errors import CheckpointError
from sparsetrain.sharding import WeightShard

_NAMES_SHOWN = 4

_Shapes = Mapping[str, tuple[int, ...]]
_Notify = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found besides what it put into the shards."""

    path: Path
    step: int
    """Optimizer steps done when it was saved."""
    state: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    """Bool masks by weight name, each of the shard's local_shape, on the weight's device."""


def latest_checkpoint(folder: Path, *, on_damaged: _Notify = warnings.warn) -> Path | None:
    """The newest intact checkpoint in `folder`; collective, and every byte of the newest is read.

    Args:
        folder: Where checkpoints are kept.
        on_damaged: Told on rank 0, for each damaged checkpoint that is passed over, what is wrong and what is used.

    Returns:
        Its path, None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints and all are damaged, or one was written in another format.
    """
    checkpoints = on_first_rank(lambda: list_checkpoints(folder))
    return _newest_intact(checkpoints, on_damaged) if checkpoints else None


def load_checkpoint(path: Path, *, shards: Sequence[WeightShard]) -> Checkpoint:
    """Load weights, masters and moments into `shards`, and restore the random number generators; collective.

    Works at any layout and number of ranks; the generators of ranks that the saving run had not are derived from its
    first rank's. Moments must exist before (`load_optimizer_state`): saved ones fill them, and a weight that had none
    when it was saved gets zeros.

    Args:
        path: A checkpoint's folder.
        shards: This rank's part of every weight of the same model.

    Raises:
        CheckpointError: It is missing, damaged (the message names the file), or of another model (the first names that
            differ). The shards are then as they were.
    """
    manifest = _verify(path)
    saved = on_first_rank(lambda: saved_shapes(path))
    _check_model(path, saved, shards)
    on_every_rank(lambda: _check_moments(path, saved, shards))
    masks = {shard.name: PackedRows(shard) for shard in shards if f"masks/{shard.name}" in saved}
    tensors = _moments(saved, shards) | {f"masks/{name}": rows.tensor() for name, rows in masks.items()}
    _load_with_weights(path, saved, shards, tensors)
    on_every_rank(lambda: _restore_rng(path, manifest))
    return Checkpoint(path, manifest.step, read_state(path), {name: rows.mask() for name, rows in masks.items()})


def read_state(path: Path) -> dict[str, Any]:
    """What was saved as `state`, without loading anything; collective.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    return on_first_rank(lambda: _read_state(path))


def load_weights(path: Path, shards: Sequence[WeightShard], *, on_damaged: _Notify = warnings.warn) -> Path:
    """Load weights alone into `shards`, at any layout, as a run starts from another's or to use a model; collective.

    Args:
        path: A checkpoint, or a run folder: then its newest intact checkpoint.
        shards: This rank's part of every weight.
        on_damaged: As in `latest_checkpoint`.

    Returns:
        The checkpoint they came from.

    Raises:
        CheckpointError: There is none, it is damaged, or its weights are not those of this model.
    """
    checkpoint = newest_intact_in(path, on_damaged)
    saved = on_first_rank(lambda: saved_shapes(checkpoint))
    _check_model(checkpoint, saved, shards)
    _load_with_weights(checkpoint, saved, shards, {})
    return checkpoint


def load_masks(path: Path, shards: Sequence[WeightShard]) -> dict[str, Tensor]:
    """The masks of a checkpoint for those of `shards` that have one, bool of their local shapes; collective."""
    saved = on_first_rank(lambda: saved_shapes(path))
    masks = {shard.name: PackedRows(shard) for shard in shards if f"masks/{shard.name}" in saved}
    load_tensors({f"masks/{name}": rows.tensor() for name, rows in masks.items()}, path)
    return {name: rows.mask() for name, rows in masks.items()}


def newest_intact_in(path: Path, on_damaged: _Notify) -> Path:
    """A checkpoint itself, or the newest intact one of a run folder; collective.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    candidates = on_first_rank(lambda: checkpoints_in(path))
    return _newest_intact(candidates, on_damaged)


def _newest_intact(checkpoints: Sequence[Path], on_damaged: _Notify) -> Path:
    problems: list[str] = []
    for checkpoint in reversed(checkpoints):
        try:
            _verify(checkpoint)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems if rank() == 0 else ():
            on_damaged(f"{problem}. Going back to {checkpoint.name}")
        return checkpoint
    raise DamagedCheckpointError("no checkpoint is intact: " + "; ".join(problems))


def _read_state(path: Path) -> dict[str, Any]:
    verify_files(path, {STATE_FILE: Manifest.read(path).files[STATE_FILE]})
    state: dict[str, Any] = torch.load(path / STATE_FILE, weights_only=True)
    return state


def _verify(checkpoint: Path) -> Manifest:
    """Check every byte, the ranks sharing the work."""
    manifest = on_first_rank(lambda: Manifest.read(checkpoint))
    by_size = sorted(manifest.files, key=lambda name: (manifest.files[name].num_bytes, name))
    on_every_rank(lambda: verify_files(checkpoint, {n: manifest.files[n] for n in by_size[rank() :: world_size()]}))
    return manifest


def _check_model(path: Path, saved: _Shapes, shards: Sequence[WeightShard]) -> None:
    here = {name: shape for of_rank in on_every_rank(lambda: _shapes(shards)) for name, shape in of_rank.items()}
    there = {name.removeprefix("model/"): shape for name, shape in saved.items() if name.startswith("model/")}
    differing = [
        f"{name} is {list(there[name])} there and {list(shape)} here"
        for name, shape in here.items()
        if name in there and there[name] != shape
    ]
    problems = [
        _some("missing in it", here.keys() - there.keys()),
        _some("unknown here", there.keys() - here.keys()),
        _some("of another shape", differing),
    ]
    if any(problems):
        raise CheckpointError(
            f"{path}: the checkpoint is of another model: " + "; ".join(filter(None, problems)) + ". "
            "Use the model section of the run that saved it"
        )


def _shapes(shards: Sequence[WeightShard]) -> dict[str, tuple[int, ...]]:
    return {shard.name: shard.global_shape for shard in shards}


def _some(what: str, items: Collection[str]) -> str:
    if not items:
        return ""
    shown = sorted(items)[:_NAMES_SHOWN]
    more = f" and {len(items) - len(shown)} more" if len(items) > len(shown) else ""
    return f"{what}: {', '.join(shown)}{more}"


def _check_moments(path: Path, saved: _Shapes, shards: Sequence[WeightShard]) -> None:
    names = _saved_moments(saved)
    for shard in shards:
        there, here = names.get(shard.name, set()), set(shard.local_moments())
        is_elsewhere = shard.local_numel == 0 and not here  # on another pipeline stage, with its moments
        if there and there != here and not is_elsewhere:
            raise CheckpointError(
                f"{path}: the checkpoint is of another optimizer: {shard.name} has the moments "
                f"{', '.join(sorted(there))} there and {', '.join(sorted(here)) or 'none'} here"
            )


def _saved_moments(saved: _Shapes) -> dict[str, set[str]]:
    moments: dict[str, set[str]] = {}
    for name in saved:
        if name.startswith("optimizer/"):
            weight, moment = name.removeprefix("optimizer/").rsplit("/", 1)
            moments.setdefault(weight, set()).add(moment)
    return moments


def _moments(saved: _Shapes, shards: Sequence[WeightShard]) -> dict[str, GlobalTensor]:
    """Moments to load; those of weights that were saved without start at zero."""
    tensors: dict[str, GlobalTensor] = {}
    for shard in shards:
        for moment, value in shard.local_moments().items():
            if (key := f"optimizer/{shard.name}/{moment}") in saved:
                tensors[key] = shard_tensor(shard, value)
            else:
                value.zero_()
    return tensors


def _load_with_weights(
    path: Path, saved: _Shapes, shards: Sequence[WeightShard], others: Mapping[str, GlobalTensor]
) -> None:
    """Load `others` and the weights; what the optimizer updates comes from what the saving optimizer updated."""
    tensors = dict(others)
    rounded: list[tuple[Tensor, Tensor]] = []
    for shard in shards:
        weight, master = shard.local_weight(), shard.local_master()
        has_master = f"master/{shard.name}" in saved
        tensors[f"master/{shard.name}" if has_master else f"model/{shard.name}"] = shard_tensor(shard, master)
        if has_own_master(weight, master):
            if has_master:
                tensors[f"model/{shard.name}"] = shard_tensor(shard, weight)
            else:
                rounded.append((weight, master))
    load_tensors(tensors, path)
    for weight, master in rounded:
        weight.copy_(master)


def _restore_rng(path: Path, manifest: Manifest) -> None:
    own = rank() < manifest.world_size
    state = torch.load(path / rank_file(rank() if own else 0), weights_only=True)
    if own:
        set_rng_state(state)
    else:
        derive_rng_state(state, rank())

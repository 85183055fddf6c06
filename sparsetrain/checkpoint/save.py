"""Save a checkpoint so that it is there whole or not at all, whatever fails."""

import io
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.checkpoint.agreement import on_every_rank, on_first_rank, rank, world_size
from sparsetrain.checkpoint.folder import (
    STATE_FILE,
    FileRecord,
    Manifest,
    new_name,
    rank_file,
    remove_replaced,
    sync_folder,
    unfinished,
    write_durably,
    writing_to,
)
from sparsetrain.checkpoint.masks import pack_masks
from sparsetrain.checkpoint.rng import rng_state
from sparsetrain.checkpoint.tensors import GlobalTensor, save_tensors, shard_tensor
from sparsetrain.errors import CheckpointError
from sparsetrain.sharding import WeightShard


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    shards: Sequence[WeightShard],
    masks: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Save weights, masters, moments, masks, `state` and every rank's random number generators; collective.

    Everything is written into a temporary folder, made durable and checksummed; a rename then makes it a checkpoint.
    What a save that died has left is cleared by the next one.

    Args:
        folder: Where checkpoints are kept, on a file system that all ranks share; made if missing.
        step: Optimizer steps done.
        shards: This rank's part of every weight.
        masks: Bool masks by weight name, each of the shard's local_shape; True lives.
        state: What else the next step depends on: plain values, containers and tensors, the same on every rank.
        keep: How many checkpoints to keep, this one included, at least 1. Older ones are deleted once it is durable,
            and so are those of later steps, which belong to a past that the run has left.

    Returns:
        The checkpoint's folder, `folder/step-<8 digits>`.

    Raises:
        CheckpointError: A rank could not write. Every rank raises it, and earlier checkpoints are untouched.
        TypeError: `state` holds something that a checkpoint cannot (with several ranks a RuntimeError that says so).
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: a checkpoint that is not kept is none")
    final_name, temporary = on_first_rank(lambda: _begin(folder, step))
    try:
        on_first_rank(lambda: _write_state(temporary, state))
        save_tensors(_named_tensors(shards, masks), temporary)
        records = on_every_rank(lambda: _finish_rank(temporary))
        return on_first_rank(lambda: _commit(temporary, folder / final_name, step, records, keep))
    except BaseException:
        # No rank writes any more: an error of one is an error of all, told when all were done.
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _begin(folder: Path, step: int) -> tuple[str, Path]:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        for leftover in unfinished(folder):
            shutil.rmtree(leftover, ignore_errors=True)
        name = new_name(folder, step)
        # A name nobody else has: a rank of a group that died may still be writing into its own.
        temporary = folder / f"{name}.tmp-{secrets.token_hex(4)}"
        temporary.mkdir()
        return name, temporary


def _named_tensors(shards: Sequence[WeightShard], masks: Mapping[str, Tensor]) -> dict[str, GlobalTensor]:
    tensors: dict[str, GlobalTensor] = {}
    for shard in shards:
        weight, master = shard.local_weight(), shard.local_master()
        tensors[f"model/{shard.name}"] = shard_tensor(shard, weight)
        if has_own_master(weight, master):
            tensors[f"master/{shard.name}"] = shard_tensor(shard, master)
        for moment, value in shard.local_moments().items():
            tensors[f"optimizer/{shard.name}/{moment}"] = shard_tensor(shard, value)
    packed = pack_masks(masks, {shard.name: shard for shard in shards if shard.name in masks})
    return tensors | {f"masks/{name}": mask for name, mask in packed.items()}


def has_own_master(weight: Tensor, master: Tensor) -> bool:
    """Whether the optimizer updates another copy than the one the forward pass reads."""
    return master.dtype != weight.dtype or master.data_ptr() != weight.data_ptr()


def _write_state(temporary: Path, state: Mapping[str, Any]) -> None:
    """Write `state`, and make sure now that it can be read back: reading accepts no pickled code."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    try:
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:
        raise TypeError(f"checkpoint state must be plain values, containers and tensors: {error}") from None
    with writing_to(temporary.parent):
        write_durably(temporary / STATE_FILE, file.getvalue())


def _finish_rank(temporary: Path) -> dict[str, FileRecord]:
    """Write what is this rank's besides tensors, and describe all its files."""
    with writing_to(temporary.parent):
        own = io.BytesIO()
        torch.save(rng_state(), own)
        write_durably(temporary / rank_file(rank()), own.getvalue())
        files = [temporary / rank_file(rank()), *temporary.glob(f"__{rank()}_*.distcp")]
        if rank() == 0:
            files += [temporary / STATE_FILE, temporary / ".metadata"]
        return {file.name: FileRecord.of(file) for file in files}


def _commit(temporary: Path, final: Path, step: int, records: Sequence[Mapping[str, FileRecord]], keep: int) -> Path:
    with writing_to(final.parent):
        files = {name: record for of_rank in records for name, record in of_rank.items()}
        for name, record in files.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != record.num_bytes:
                raise CheckpointError(
                    f"{path}: written by another rank, and not here on rank 0. "
                    "Set output to a folder on a file system that all ranks share"
                )
        Manifest(step, world_size(), files).write(temporary)
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(final.parent)
    remove_replaced(final.parent, final, keep)
    return final

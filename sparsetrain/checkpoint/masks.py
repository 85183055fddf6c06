"""Masks at 1 bit a weight: rows of the weight packed into bytes, whatever part of them a rank holds.

A packed mask is one whole tensor, uint8 of [rows, ceil(cols / 8)], for a weight of [..., cols]: bit i of byte j of a
row says whether weight 8·j + i of that row lives. A rank that holds whole rows saves its own bytes. Where a row is cut
(a flat partition, or columns over ranks) two ranks would share a byte, so the ranks first put the rows together.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sparsetrain.checkpoint.agreement import on_every_rank
from sparsetrain.checkpoint.tensors import Box, GlobalTensor
from sparsetrain.sharding import WeightShard


def pack_masks(masks: Mapping[str, Tensor], shards: Mapping[str, WeightShard]) -> dict[str, GlobalTensor]:
    """Pack masks for saving; collective over the world and over the groups of the weights.

    Args:
        masks: Bool masks by weight name, each of the shard's local_shape.
        shards: The weights by name, on every rank those that the rank has masks of.
    """
    cut = {name for names in on_every_rank(lambda: _cut_rows(masks, shards)) for name in names}
    return {
        name: _whole(shards[name], masks[name]) if name in cut else _own_rows(shards[name], masks[name])
        for name in sorted(masks)
    }


class PackedRows:
    """Room for the packed rows that a rank's part of a mask lies in, to be filled from a checkpoint."""

    def __init__(self, shard: WeightShard) -> None:
        self._shard = shard
        self._first, count = _rows_touched(shard)
        self._bytes = torch.zeros(count, _row_bytes(shard), dtype=torch.uint8)

    def tensor(self) -> GlobalTensor:
        """What to load."""
        boxes = [Box((self._first, 0), self._bytes)] if len(self._bytes) else []
        return GlobalTensor(packed_shape(self._shard), boxes)

    def mask(self) -> Tensor:
        """The local mask, bool of local_shape on the weight's device, once loaded."""
        rows = np.unpackbits(self._bytes.numpy(), axis=-1, count=_cols(self._shard), bitorder="little").view(np.bool_)
        local = rows.reshape(-1)[_positions(self._shard, self._first)].reshape(self._shard.local_shape)
        return torch.from_numpy(local.copy()).to(self._shard.local_weight().device)


def packed_shape(shard: WeightShard) -> tuple[int, int]:
    """Shape of the packed mask of the whole weight."""
    return math.prod(shard.global_shape[:-1]), _row_bytes(shard)


def _cut_rows(masks: Mapping[str, Tensor], shards: Mapping[str, WeightShard]) -> list[str]:
    """Weights of which this rank holds a part of a row."""
    return [name for name in masks if not _holds_whole_rows(shards[name])]


def _holds_whole_rows(shard: WeightShard) -> bool:
    _, count = _rows_touched(shard)
    return shard.local_numel == count * _cols(shard)


def _own_rows(shard: WeightShard, mask: Tensor) -> GlobalTensor:
    first, packed = _pack(shard, mask)
    return GlobalTensor(packed_shape(shard), [Box((first, 0), packed)] if len(packed) else [])


def _whole(shard: WeightShard, mask: Tensor) -> GlobalTensor:
    """Put the packed rows of all ranks together: each bit is set by one rank at most, so their sum is their union."""
    first, rows = _pack(shard, mask)
    packed = torch.zeros(packed_shape(shard), dtype=torch.uint8)
    packed[first : first + len(rows)] = rows
    if shard.group is not None:
        packed = packed.to(mask.device)
        dist.all_reduce(packed, group=shard.group)
    return GlobalTensor(packed_shape(shard), [Box((0, 0), packed.cpu())])


def _pack(shard: WeightShard, mask: Tensor) -> tuple[int, Tensor]:
    """The first row that the local part touches, and those rows packed; weights held elsewhere count as zero."""
    first, count = _rows_touched(shard)
    rows: NDArray[np.bool_] = np.zeros((count, _cols(shard)), dtype=np.bool_)
    rows.reshape(-1)[_positions(shard, first)] = mask.cpu().numpy().reshape(-1)
    return first, torch.from_numpy(np.packbits(rows, axis=-1, bitorder="little"))


def _rows_touched(shard: WeightShard) -> tuple[int, int]:
    """First row that holds some of the local part, and number of rows from there to the last that does."""
    if shard.local_numel == 0:
        return 0, 0
    first, last = _flat_ends(shard)
    cols = _cols(shard)
    return first // cols, last // cols - first // cols + 1


def _positions(shard: WeightShard, first_row: int) -> slice | NDArray[np.int64]:
    """Where the local part lies in the flattened rows from `first_row` on."""
    if shard.local_numel == 0:
        return slice(0, 0)
    first, last = _flat_ends(shard)
    base = first_row * _cols(shard)
    if last - first + 1 == shard.local_numel:
        return slice(first - base, last - base + 1)
    return shard.global_indices().numpy().reshape(-1) - base


def _flat_ends(shard: WeightShard) -> tuple[int, int]:
    """Positions in the flattened weight of the first and the last element of a part that is not empty."""
    if shard.is_flat:
        return shard.slices[0].start, shard.slices[0].stop - 1
    return (
        _flat_position(shard.global_shape, [part.start for part in shard.slices]),
        _flat_position(shard.global_shape, [part.stop - 1 for part in shard.slices]),
    )


def _flat_position(shape: Sequence[int], index: Sequence[int]) -> int:
    position = 0
    for size, at in zip(shape, index, strict=True):
        position = position * size + at
    return position


def _cols(shard: WeightShard) -> int:
    return shard.global_shape[-1] if shard.global_shape else 1


def _row_bytes(shard: WeightShard) -> int:
    return -(-_cols(shard) // 8)

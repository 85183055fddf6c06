import pytest
import torch

from sparsetrain.checkpoint.masks import PackedRows, pack_masks, packed_shape
from sparsetrain.checkpoint.tensors import load_tensors, save_tensors
from sparsetrain.sharding import WeightShard


def shard_of(shape: tuple[int, ...], slices: tuple[slice, ...] | None = None) -> WeightShard:
    slices = slices or tuple(slice(0, size) for size in shape)
    shard = WeightShard("w", shape, slices, None, 0, lambda: weight, lambda: None, lambda: weight, dict)
    weight = torch.zeros(shard.local_shape)
    return shard


SHAPES = [(), (1,), (7,), (8,), (3, 5), (4, 8), (5, 1), (2, 3, 17)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_come_back_from_one_bit_a_weight(tmp_path, shape):
    torch.manual_seed(0)
    shard, mask = shard_of(shape), torch.rand(shape) < 0.5
    save_tensors(pack_masks({"w": mask}, {"w": shard}), tmp_path)
    rows = PackedRows(shard)
    load_tensors({"w": rows.tensor()}, tmp_path)
    assert torch.equal(rows.mask(), mask)
    assert rows.mask().dtype == torch.bool


PARTS = {
    "rows": ((6, 13), (slice(2, 5), slice(0, 13))),
    "columns": ((6, 13), (slice(0, 6), slice(5, 11))),
    "middle of 3-d": ((2, 3, 17), (slice(0, 2), slice(1, 2), slice(0, 17))),
    "flat range inside one row": ((6, 13), (slice(14, 20),)),
    "flat range across rows": ((6, 13), (slice(20, 61),)),
    "flat range of a scalar": ((), (slice(0, 1),)),
    "nothing": ((6, 13), (slice(40, 40),)),
    "no rows": ((6, 13), (slice(6, 6), slice(0, 13))),
}


@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_a_mask_is_read_from_the_whole(tmp_path, part):
    torch.manual_seed(0)
    shape, slices = PARTS[part]
    whole, shard = torch.rand(shape) < 0.5, shard_of(shape, slices)
    save_tensors(pack_masks({"w": whole}, {"w": shard_of(shape)}), tmp_path)
    rows = PackedRows(shard)
    load_tensors({"w": rows.tensor()}, tmp_path)
    assert torch.equal(rows.mask(), shard.cut(whole))


def test_a_weight_takes_one_bit():
    assert packed_shape(shard_of((64, 4096))) == (64, 512)
    assert packed_shape(shard_of((3, 5, 9))) == (15, 2)

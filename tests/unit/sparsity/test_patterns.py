import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.errors import ConfigError
from sparsetrain.sharding import WeightShard
from sparsetrain.sparsity.patterns import Block, Unstructured, misfit, pattern_of


def shard_of(shape: tuple[int, ...], slices: tuple[slice, ...]) -> WeightShard:
    zero = torch.zeros(0)
    return WeightShard("w", shape, slices, None, 0, lambda: zero, lambda: None, lambda: zero, dict)


@st.composite
def blocks_and_cuts(draw: st.DrawFn) -> tuple[Block, tuple[int, ...], list[tuple[slice, ...]]]:
    """A weight, a block that divides it, and cuts of the weight in two or three: by rows, by columns, or flat."""
    block = Block(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=1)))
    shape = (*lead, block.rows * draw(st.integers(1, 3)), block.cols * draw(st.integers(1, 3)))
    total = torch.Size(shape).numel()
    dim = draw(st.sampled_from([*range(len(shape)), None]))
    size = total if dim is None else shape[dim]
    at = sorted(draw(st.lists(st.integers(0, size), min_size=1, max_size=2)))
    parts = [slice(a, b) for a, b in zip([0, *at], [*at, size], strict=True)]
    if dim is None:
        return block, shape, [(part,) for part in parts]
    whole = [slice(0, extent) for extent in shape]
    return block, shape, [(*whole[:dim], part, *whole[dim + 1 :]) for part in parts]


@given(blocks_and_cuts())
def test_block_sums_and_masks_do_not_depend_on_the_cut(
    case: tuple[Block, tuple[int, ...], list[tuple[slice, ...]]],
) -> None:
    block, shape, cuts = case
    weight = torch.arange(1, torch.Size(shape).numel() + 1).view(shape) ** 2
    grid = block.grid(shape)
    chosen = torch.arange(torch.Size(grid).numel()) % 3 == 0
    expected_sums = torch.zeros(grid, dtype=torch.int64)
    expected_mask = torch.zeros(shape, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        unit = (*index[:-2], index[-2] // block.rows, index[-1] // block.cols)
        expected_sums[unit] += weight[tuple(index)]
        expected_mask[tuple(index)] = chosen.view(grid)[unit]
    shards = [shard_of(shape, cut) for cut in cuts]
    sums = sum(block.sums(shard, shard.cut(weight).contiguous()) for shard in shards)
    assert torch.equal(sums, expected_sums.view(-1))
    for shard in shards:
        assert torch.equal(block.expand(shard, chosen), shard.cut(expected_mask))


def test_a_block_that_does_not_divide_a_weight_is_a_misfit_that_names_it() -> None:
    assert Block(2, 4).misfit("w", (4, 8)) is None
    for shape in ((4, 7), (3, 8), (8,), (8, 2, 6)):
        assert f"block[2,4] does not divide w of shape {list(shape)}" in (Block(2, 4).misfit("w", shape) or "")
    assert Unstructured().misfit("w", (7,)) is None


@pytest.mark.parametrize(("text", "pattern"), [("unstructured", Unstructured()), ("block[1,1]", Unstructured())])
def test_blocks_of_one_weight_are_unstructured(text: str, pattern: Unstructured) -> None:
    assert pattern_of(SparsityRule(params="*", method="static", sparsity=0.5, pattern=text)) == pattern
    assert pattern.num_units((3, 4)) == 12
    assert Block(3, 2).num_units((5, 6, 4)) == 20


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        ("2:4", (8, 6), "m=4 does not divide w of shape"),
        ("2:4", (8,), "m=4 does not divide w of shape"),
        (
            "vector 1:4",
            (96, 8),
            "vector[64] 1:4 does not divide w of shape [96, 8]; its outputs must be a multiple",
        ),
        ("vector[8] 1:4", (8, 6), "and its inputs of 4"),
    ],
)
def test_groups_that_do_not_divide_say_so(pattern: str, shape: tuple[int, ...], message: str) -> None:
    rule = SparsityRule(params="w", method="static", pattern=pattern)
    found = misfit(rule, "w", shape)
    assert found is not None
    assert message in found
    assert misfit(rule, "w", (2, 64, 64)) is None


@pytest.mark.parametrize(
    ("pattern", "method", "message"),
    [
        ("4:2", "static", "choose 1 <= n < m <= 64"),
        ("1:65", "static", "choose 1 <= n < m <= 64"),
        ("vector 0:4", "static", "choose 1 <= n < m <= 64"),
        ("vector[0] 1:4", "static", "at least one output"),
        ("vector", "static", "expected unstructured, block"),
        ("vector 1:4", "bdwp", "takes n:m without vectors"),
        ("2:4", "prune", "use static or ste"),
    ],
)
def test_groups_that_cannot_be_are_refused(pattern: str, method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SparsityRule(params="w", method=method, pattern=pattern)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.config import SparsityRule
from sparsetrain.errors import ConfigError
from sparsetrain.sparsity.distributions import (
    erk_densities,
    keep_erk,
    keep_floors,
    keep_global,
    keep_uniform,
    num_kept,
)

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple), min_size=1, max_size=6)
SPARSITY = st.floats(0.0, 1.0, exclude_max=True)


def test_erk_of_three_small_layers_leaves_two_of_them_dense() -> None:
    densities = erk_densities([(2, 4), (3, 6, 7), (7, 4)], 0.5)
    assert [round(1 - density, 2) for density in densities] == [0.0, 0.64, 0.0]
    assert densities[1] == pytest.approx(45 / 126)
    assert keep_erk([(2, 4), (3, 6, 7), (7, 4)], [8, 126, 28], 0.5, [8, 126, 28]) == [8, 45, 28]


def test_erk_of_a_gpt2_block_with_fused_qkv() -> None:
    densities = erk_densities([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 0.75)
    assert densities == pytest.approx([0.25, 0.375, 0.234375, 0.234375], abs=1e-12)


@given(SHAPES, SPARSITY)
def test_erk_counts_add_up_to_the_global_count(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    sizes = [prod(shape) for shape in shapes]
    keep = keep_erk(shapes, sizes, sparsity, sizes)
    assert sum(keep) == num_kept(sum(sizes), sparsity)
    for density, count, size in zip(erk_densities(shapes, sparsity), keep, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count - density * size) <= 1 + 1e-6


@given(SHAPES, SPARSITY, SPARSITY)
def test_erk_within_earlier_masks_never_asks_for_more_than_is_left(
    shapes: list[tuple[int, ...]], first: float, second: float
) -> None:
    sizes = [prod(shape) for shape in shapes]
    low, high = sorted((first, second))
    available = keep_erk(shapes, sizes, low, sizes)
    keep = keep_erk(shapes, sizes, high, available)
    assert all(count <= most for count, most in zip(keep, available, strict=True))
    assert sum(keep) == num_kept(sum(sizes), high)


def test_rounding_halves_go_to_zeros() -> None:
    assert [num_kept(size, 0.5) for size in (1, 2, 3, 10)] == [0, 1, 1, 5]
    assert num_kept(65536, 0.75) == 16384
    assert num_kept(7, 0.0) == 7


def test_uniform_rounds_each_weight_and_stops_at_what_is_left() -> None:
    assert keep_uniform([10, 10, 5], 0.75, [10, 1, 5]) == [2, 1, 1]


def test_global_counts_over_all_and_floors_round_down() -> None:
    assert keep_global([10, 10, 5], 0.75, [10, 10, 5]) == 6
    assert keep_global([10, 10, 5], 0.1, [3, 2, 1]) == 6
    assert keep_floors([10, 10, 5], 0.25, [10, 1, 5]) == [2, 1, 1]


def test_a_floor_above_what_the_sparsity_leaves_is_refused() -> None:
    def rule(floor: float) -> SparsityRule:
        return SparsityRule(params="*", method="static", sparsity=0.9, distribution={"kind": "global", "floor": floor})

    assert rule(0.1).distribution.kind == "global"
    with pytest.raises(ConfigError, match=r"sparsity=0.9 leaves 0.1 of the weights"):
        rule(0.2)


def prod(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total

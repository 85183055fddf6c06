from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.data.order import SampleOrder, derive_keys, mixture_slots, permute

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**64 - 1)


def shuffle(size: int, seed: int, epoch: int = 0) -> list[int]:
    keys = derive_keys(seed, 1, np.full(size, epoch))
    return permute(np.arange(size), size, keys).tolist()


@given(sizes, seeds, st.integers(0, 2**40))
def test_permute_is_a_bijection_of_any_size(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffle(size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 + 1])
def test_permute_reaches_corpora_larger_than_memory(size: int) -> None:
    indices = np.arange(size - 1000, size)
    shuffled = permute(indices, size, derive_keys(0, 1, np.zeros(1000, dtype=np.int64)))

    assert len(set(shuffled.tolist())) == 1000
    assert shuffled.min() >= 0
    assert shuffled.max() < size
    assert shuffled.max() > size // 2 > shuffled.min()


def test_every_place_is_equally_likely_for_every_index() -> None:
    epochs = 6000
    keys = derive_keys(7, 1, np.arange(epochs))
    for index in range(6):
        counts = np.bincount(permute(np.full(epochs, index), 6, keys), minlength=6)
        assert ((counts - epochs / 6) ** 2 / (epochs / 6)).sum() < 25  # chi squared, 5 degrees: p = 1e-4


def test_neighbours_are_torn_apart() -> None:
    shuffled = np.array(shuffle(10_000, 0))

    assert abs(np.corrcoef(np.arange(10_000), shuffled)[0, 1]) < 0.03
    assert np.mean(np.abs(np.diff(shuffled)) < 10) < 0.01  # 0.2 % by chance


def test_seeds_and_epochs_shuffle_differently() -> None:
    orders = {tuple(shuffle(100, seed, epoch)) for seed in (0, 1, 2**63) for epoch in range(3)}

    assert len(orders) == 9


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=4),
    seeds,
    st.integers(0, 10**9),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
)
def test_any_stretch_of_the_order_can_be_computed_by_itself(
    sources: list[tuple[int, float]], seed: int, first: int, counts: list[int]
) -> None:
    order = SampleOrder([size for size, _ in sources], [weight for _, weight in sources], seed)
    whole = order.draw(first, sum(counts))
    parts = []
    for count in counts:
        parts.append(order.draw(first, count))
        first += count

    assert np.concatenate([part.source for part in parts]).tolist() == whole.source.tolist()
    assert np.concatenate([part.sample for part in parts]).tolist() == whole.sample.tolist()


@given(st.integers(1, 300), seeds, st.integers(0, 5))
def test_no_sample_comes_twice_or_is_lost_in_an_epoch(size: int, seed: int, epoch: int) -> None:
    draw = SampleOrder([size], [1.0], seed).draw(epoch * size, size)

    assert sorted(draw.sample.tolist()) == list(range(size))


def test_each_source_of_a_mixture_runs_through_its_own_epochs() -> None:
    draw = SampleOrder([7, 50], [0.75, 0.25], seed=3).draw(0, 4 * 100)
    small = draw.sample[draw.source == 0].tolist()
    large = draw.sample[draw.source == 1].tolist()

    assert (len(small), len(large)) == (300, 100)
    for epoch in range(300 // 7):
        assert sorted(small[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert sorted(large[:50]) == sorted(large[50:]) == list(range(50))
    assert large[:50] != large[50:]


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ((2.0,), (1,)),
        ((1.0, 1.0), (1, 1)),
        ((0.7, 0.3), (7, 3)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((70, 20, 10), (7, 2, 1)),
        ((0.9, 0.05, 0.05), (18, 1, 1)),
        ((1.0, 1e-9), (100_799, 1)),
    ],
    ids=str,
)
def test_weights_become_slots_in_lowest_terms(weights: tuple[float, ...], slots: tuple[int, ...]) -> None:
    assert mixture_slots(weights) == slots


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_slots_are_within_one_of_the_weights(weights: list[float]) -> None:
    slots = mixture_slots(weights)
    shares = np.array(weights) / sum(weights)

    assert np.abs(np.array(slots) / sum(slots) - shares).max() <= 1.01 * len(weights) / 100_800
    assert min(slots) >= 1


def test_mixture_is_exact_in_every_cycle_and_shuffled_within() -> None:
    draw = SampleOrder([1000, 1000], [0.7, 0.3], seed=5).draw(0, 1000)
    cycles = draw.source.reshape(100, 10)

    assert (cycles.sum(axis=1) == 3).all()
    assert len(Counter(map(tuple, cycles.tolist()))) > 5

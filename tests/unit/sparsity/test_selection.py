"""Selection against a full sort, on one rank; over several ranks in tests/distributed/test_masks.py."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.sparsity import selection
from sparsetrain.sparsity.selection import Problem, Units, select


def units_of(keys: Tensor) -> Units:
    return Units(len(keys), len(keys), lambda part: keys[part].clone(), lambda local: local, None, keys.device)


def by_sorting(parts: list[list[int]], keep: int) -> list[bool]:
    """Keep the largest keys; among equal ones those that stand first."""
    keys = np.concatenate([np.array(part, dtype=np.int64) for part in parts])
    mask = np.zeros(len(keys), dtype=bool)
    mask[np.argsort(-keys, kind="stable")[:keep]] = True
    return mask.tolist()


def selected(masks: list[Tensor]) -> list[bool]:
    return torch.cat(masks).tolist()


@st.composite
def problems(draw: st.DrawFn, largest: int) -> tuple[list[list[int]], int]:
    key = st.one_of(st.integers(0, 3), st.integers(0, largest), st.just(largest))
    parts = draw(st.lists(st.lists(key, max_size=12), min_size=1, max_size=4))
    return parts, draw(st.integers(0, sum(map(len, parts))))


@given(st.lists(problems(2**31 - 1), min_size=1, max_size=4))
def test_several_problems_at_once_equal_a_stable_sort_of_each(cases: list[tuple[list[list[int]], int]]) -> None:
    batch = [
        Problem([units_of(torch.tensor(part, dtype=torch.int32)) for part in parts], keep) for parts, keep in cases
    ]
    for (parts, keep), masks in zip(cases, select(batch, 31), strict=True):
        assert selected(masks) == by_sorting(parts, keep)


@given(problems(2**63 - 1))
def test_64_bit_keys_equal_a_stable_sort(case: tuple[list[list[int]], int]) -> None:
    parts, keep = case
    problem = Problem([units_of(torch.tensor(part, dtype=torch.int64)) for part in parts], keep)
    assert selected(select([problem], 63)[0]) == by_sorting(parts, keep)


@given(st.integers(0, 3000), st.integers(1, 40))
@settings(max_examples=15)
def test_many_ties_are_broken_by_position_across_chunks(keep: int, num_values: int) -> None:
    keys = torch.arange(3000, dtype=torch.int32) * 7919 % num_values
    before = selection._CPU_CHUNK
    selection._CPU_CHUNK = 256
    try:
        mask = select([Problem([units_of(keys[:1000]), units_of(keys[1000:])], keep)], 31)[0]
    finally:
        selection._CPU_CHUNK = before
    assert selected(mask) == by_sorting([keys.tolist()], keep)


def test_ties_follow_the_global_index_and_not_the_local_order() -> None:
    keys = torch.zeros(6, dtype=torch.int32)
    backwards = Units(6, 6, lambda part: keys[part], lambda local: 5 - local, None, keys.device)
    assert selected(select([Problem([backwards], 2)], 31)[0]) == [False, False, False, False, True, True]


def test_nothing_to_choose_from_gives_empty_masks() -> None:
    empty = units_of(torch.empty(0, dtype=torch.int32))
    assert [len(mask) for mask in select([Problem([empty, empty], 0)], 31)[0]] == [0, 0]

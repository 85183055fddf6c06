"""Masks on one rank against an oracle that sorts: every pattern, distribution and criterion."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.sharding import WeightShard, weight_shards
from sparsetrain.sparsity.choose import choose_masks, global_index
from sparsetrain.sparsity.distributions import erk_densities
from sparsetrain.sparsity.keys import random_keys
from sparsetrain.sparsity.weights import SparseWeight, update_masks

SHAPES = {"a": (4, 6), "b": (8, 4), "c": (2, 4, 2)}
DISTRIBUTIONS = {"uniform": "uniform", "erk": "erk", "global": "global", "floor": {"kind": "global", "floor": 0.2}}


def rule_of(pattern: str, distribution: str, criterion: str) -> SparsityRule:
    return SparsityRule(
        params="*",
        method="prune",
        pattern=pattern,
        distribution=DISTRIBUTIONS[distribution],
        criterion=criterion,
        sparsity=0.8,
        schedule={"kind": "geometric"},
    )


def weights_of(values: dict[str, torch.Tensor]) -> list[SparseWeight]:
    module = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})
    return [SparseWeight.dense(shard) for shard in weight_shards(module)]


def units(weight: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """[units, entries of a unit], units in row-major order."""
    *lead, height, width = weight.shape
    grid = weight.reshape(*lead, height // rows, rows, width // cols, cols)
    return np.moveaxis(grid, -3, -2).reshape(-1, rows * cols)


def oracle(values: dict[str, torch.Tensor], rule: SparsityRule, sparsity: float, seed: int) -> dict[str, np.ndarray]:
    """Masks by units, from stable sorts of exact sums; nothing is zero before."""
    rows, cols = rule.block.rows, rule.block.cols
    scores = {}
    for name, value in values.items():
        entries = units(value.double().abs().numpy(), rows, cols)
        scores[name] = [math.fsum(row) for row in entries]
        if rule.criterion == "random":
            scores[name] = random_keys(seed, name, torch.arange(len(entries))).tolist()
    sizes = {name: len(row) for name, row in scores.items()}
    kept = {name: np.zeros(size, dtype=bool) for name, size in sizes.items()}
    kind = rule.distribution.kind
    if kind == "global":
        everything = [(name, at) for name in sorted(scores) for at in range(sizes[name])]
        count = len(everything) - math.floor(sparsity * len(everything) + 0.5)
        ranked = sorted(everything, key=lambda unit: -scores[unit[0]][unit[1]])
        for name in scores:
            best = [unit for unit in ranked if unit[0] == name][: math.floor(rule.distribution.floor * sizes[name])]
            for _, at in best:
                kept[name][at] = True
        for name, at in ranked:
            if sum(mask.sum() for mask in kept.values()) == count:
                break
            kept[name][at] = True
        return kept
    for name, density in zip(sorted(scores), densities(rule, values, sparsity), strict=True):
        count = density if isinstance(density, int) else sizes[name] - math.floor((1 - density) * sizes[name] + 0.5)
        kept[name][np.argsort(-np.array(scores[name]), kind="stable")[:count]] = True
    return kept


def densities(rule: SparsityRule, values: dict[str, torch.Tensor], sparsity: float) -> list[float | int]:
    if rule.distribution.kind == "uniform":
        return [1 - sparsity] * len(values)
    shapes = [tuple(values[name].shape) for name in sorted(values)]
    sizes = [math.prod(shape) // (rule.block.rows * rule.block.cols) for shape in shapes]
    shares = [density * size for density, size in zip(erk_densities(shapes, sparsity), sizes, strict=True)]
    counts = [math.floor(share) for share in shares]
    missing = sum(sizes) - math.floor(sparsity * sum(sizes) + 0.5) - sum(counts)
    for at in sorted(range(len(shares)), key=lambda at: counts[at] - shares[at])[:missing]:
        counts[at] += 1
    return counts


CASES = [
    pytest.param(*case, id="-".join(case))
    for case in itertools.product(["unstructured", "block[2,2]"], DISTRIBUTIONS, ["magnitude", "random"])
]


@pytest.mark.parametrize(("pattern", "distribution", "criterion"), CASES)
@given(data=st.data())
@settings(max_examples=25)
def test_masks_equal_a_stable_sort(pattern: str, distribution: str, criterion: str, data: st.DataObject) -> None:
    """Values with many ties, zeros of both signs, and numbers whose sums no float32 holds exactly."""
    palette = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-20, -(2.0**-20), 1.0 + 2.0**-20, 0.7, -0.3])
    values = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        drawn = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        values[name] = palette[drawn.long() % len(palette)].view(shape) * data.draw(st.sampled_from([1.0, 0.25, 4.0]))
    rule = rule_of(pattern, distribution, criterion)
    sparsity = data.draw(st.floats(0.0, 0.75))
    weights = weights_of(values)
    masks = choose_masks(weights, rule, sparsity, seed=3, within=False)
    expected = oracle(values, rule, sparsity, seed=3)
    for weight, mask in zip(weights, masks, strict=True):
        of_units = units(mask.numpy(), rule.block.rows, rule.block.cols)
        assert (of_units == of_units[:, :1]).all()
        assert of_units[:, 0].tolist() == expected[weight.shard.name].tolist()
        assert mask.shape == weight.shard.local_shape


@pytest.mark.parametrize(("pattern", "distribution", "criterion"), CASES)
def test_choosing_again_and_again_only_loses_weights_and_counts_stay_exact(
    pattern: str, distribution: str, criterion: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (16, 24), "b": (32, 8), "c": (2, 12, 16)}
    rule = rule_of(pattern, distribution, criterion)
    weights = weights_of({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    unit = rule.block.rows * rule.block.cols
    for sparsity in (0.1, 0.35, 0.35, 0.6, 0.78):
        before = [weight.bits.bool() for weight in weights]
        update_masks(weights, choose_masks(weights, rule, sparsity, seed=1, within=True))
        for weight, old in zip(weights, before, strict=True):
            assert not (weight.bits.bool() & ~old).any()
            assert weight.nonzeros == int(weight.bits.bool().sum())
            assert weight.flips == int((weight.bits.bool() != old).sum())
            weight.shard.local_weight().uniform_(-1, 1, generator=generator)
            weight.zero_weight()
        sizes = [weight.shard.global_numel // unit for weight in weights]
        total = sum(sizes) - math.floor(sparsity * sum(sizes) + 0.5)
        if distribution == "uniform":
            total = sum(size - math.floor(sparsity * size + 0.5) for size in sizes)
        assert sum(weight.nonzeros for weight in weights) == total * unit


def test_living_zeros_come_before_zeroed_weights() -> None:
    """After a first cut only the index tells zeros apart; the mask must."""
    for pattern in ("unstructured", "block[1,2]"):
        rule = rule_of(pattern, "uniform", "magnitude")
        (weight,) = weights_of({"w": torch.zeros(4, 4)})
        dead = torch.ones(4, 4, dtype=torch.bool)
        dead[0] = False
        update_masks([weight], [dead])
        (mask,) = choose_masks([weight], rule, 0.5, seed=0, within=True)
        assert mask.tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]


def test_blocks_over_masks_of_single_weights_do_not_bring_any_back() -> None:
    (weight,) = weights_of({"w": torch.arange(16.0).view(4, 4) + 1})
    old = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    update_masks([weight], [old])
    weight.zero_weight()
    (mask,) = choose_masks([weight], rule_of("block[2,2]", "uniform", "magnitude"), 0.25, seed=0, within=True)
    assert not (mask & ~old).any()
    assert (units(mask.numpy(), 2, 2).any(1)).sum() == 3


def test_float64_weights_are_told_apart_beyond_float32() -> None:
    close = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0]], dtype=torch.float64)
    for other in ({}, {"z": torch.full((1, 2), 1.0)}):  # alone, and beside a float32 weight
        weights = weights_of({"w": close, **other})
        masks = choose_masks(weights, rule_of("unstructured", "global", "magnitude"), 0.5, seed=0, within=False)
        assert masks[0].tolist() == [[True, True, False, bool(other)]]


@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), st.data())
def test_global_index_names_every_local_element(shape: list[int], data: st.DataObject) -> None:
    flat = data.draw(st.booleans()) or not shape
    slices = []
    for size in [math.prod(shape)] if flat else shape:
        start = data.draw(st.integers(0, size))
        slices.append(slice(start, data.draw(st.integers(start, size))))
    zero = torch.zeros(0)
    shard = WeightShard("w", tuple(shape), tuple(slices), None, 0, lambda: zero, lambda: None, lambda: zero, dict)
    found = global_index(shard, torch.arange(shard.local_numel))
    assert torch.equal(found, shard.global_indices().view(-1))


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "vector[2] 2:4", "vector[4] 1:2", "3:64"])
def test_groups_keep_their_best(pattern: str, criterion: str) -> None:
    torch.manual_seed(0)
    shapes = {"a": (8, 64), "b": (2, 4, 128)}  # the second as of two experts
    values = {name: torch.randint(-9, 10, shape) / 8 for name, shape in shapes.items()}  # many ties
    values["a"][:4] = 0.0
    rule = SparsityRule(params="*", method="static", pattern=pattern, criterion=criterion)
    assert rule.groups is not None
    vector, n, m = rule.groups.vector, rule.groups.n, rule.groups.m
    masks = choose_masks(weights_of(values), rule, rule.sparsity, seed=3, within=False)
    for (name, value), mask in zip(values.items(), masks, strict=True):
        rows = value.abs().double().view(-1, vector, value.shape[-1]).sum(1)
        if criterion == "random":
            rows = random_keys(3, name, torch.arange(rows.numel())).view(rows.shape).double()
        for row, kept in zip(rows, mask.view(-1, vector, value.shape[-1]), strict=True):
            assert bool((kept == kept[0]).all())
            for start in range(0, len(row), m):
                best = sorted(range(m), key=lambda at, row=row, start=start: (-float(row[start + at]), at))[:n]
                assert kept[0, start : start + m].nonzero().view(-1).tolist() == sorted(best)

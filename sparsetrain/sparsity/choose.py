"""Choosing masks: a criterion ranks units, a distribution says how many of each weight stay, selection picks them.

Everything is decided on integers that do not depend on how the weights lie over ranks, so neither do the masks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, log2

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.config.sparsity import ErdosRenyiKernel, Global, SparsityRule, Uniform
from sparsetrain.sharding import WeightShard
from sparsetrain.sparsity.distributions import keep_erk, keep_floors, keep_global, keep_uniform
from sparsetrain.sparsity.keys import fixed_point, largest_magnitudes, magnitude_keys, random_keys
from sparsetrain.sparsity.patterns import Block, Groups, pattern_of
from sparsetrain.sparsity.selection import Problem, Units, select
from sparsetrain.sparsity.weights import SparseWeight

Importance = Callable[[WeightShard], Tensor]
"""Local values of `local_shape` whose magnitude says how much a weight matters."""

CRITERIA: dict[str, Importance | None] = {"random": None, "magnitude": lambda shard: shard.local_master()}
"""None: a hash of (seed, name, global index) instead of values."""


def choose_masks(
    weights: Sequence[SparseWeight], rule: SparsityRule, sparsity: float, *, seed: int, within: bool
) -> list[Tensor]:
    """Choose the masks of one rule's weights; collective over their groups.

    Args:
        weights: All that the rule owns, sorted by name.
        rule: Pattern, distribution and criterion.
        sparsity: Over each weight or over all, as the distribution has it; rounding is stated in `distributions`. An
            n:m pattern says it itself.
        seed: For the random criterion.
        within: Choose among the weights that live now; none of the others comes back, and where a weight has fewer
            left than it should keep, all of them stay.

    Returns:
        Bool masks of the local shapes.

    Raises:
        TrainingError: The criterion's values hold NaN or infinity; on all ranks.
    """
    importance = CRITERIA[rule.scored_by]
    values = None if importance is None else [importance(weight.shard).contiguous() for weight in weights]
    largest = None if values is None else largest_magnitudes([weight.shard for weight in weights], values)
    if rule.groups is not None:
        groups = Groups(rule.groups.n, rule.groups.m, rule.groups.vector)
        scores = _block_scores(weights, groups.units, values, largest, seed=seed, within=within)
        return [
            groups.units.expand(weight.shard, groups.largest(score))
            for weight, score in zip(weights, scores, strict=True)
        ]
    key_bits = 31
    pattern = pattern_of(rule)
    if isinstance(pattern, Block):
        scores = _block_scores(weights, pattern, values, largest, seed=seed, within=within)
        available = [int((score > 0).sum()) for score in scores]
        units = [_units_of_scores(score) for score in scores]
        key_bits = 63
    else:
        if values is not None and any(value.dtype == torch.float64 for value in values):
            values, key_bits = [value.double() for value in values], 63
        available = [weight.nonzeros if within else weight.shard.global_numel for weight in weights]
        units = [
            _units_of_entries(weight, None if values is None else values[at].view(-1), seed=seed, within=within)
            for at, weight in enumerate(weights)
        ]
    chosen = _distribute(rule, [weight.shard.global_shape for weight in weights], units, available, sparsity, key_bits)
    masks = [
        pattern.expand(weight.shard, mask) if isinstance(pattern, Block) else mask.view(weight.shard.local_shape)
        for weight, mask in zip(weights, chosen, strict=True)
    ]
    if within:  # a block that lives may hold weights that an earlier phase zeroed one by one
        masks = [mask & (weight.bits != 0) for mask, weight in zip(masks, weights, strict=True)]
    return masks


def _distribute(
    rule: SparsityRule,
    shapes: Sequence[tuple[int, ...]],
    units: Sequence[Units],
    available: Sequence[int],
    sparsity: float,
    key_bits: int,
) -> list[Tensor]:
    """One mask of units per weight."""
    sizes = [one.total for one in units]
    match rule.distribution:
        case Uniform():
            keep = keep_uniform(sizes, sparsity, available)
        case ErdosRenyiKernel():
            keep = keep_erk(shapes, sizes, sparsity, available)
        case Global(floor=floor):
            if floor > 0:
                protected = _each(units, keep_floors(sizes, floor, available), key_bits)
                units = [_first(one, mask, key_bits) for one, mask in zip(units, protected, strict=True)]
            return select([Problem(units, keep_global(sizes, sparsity, available))], key_bits)[0]
    return _each(units, keep, key_bits)


def _each(units: Sequence[Units], keep: Sequence[int], key_bits: int) -> list[Tensor]:
    problems = [Problem([one], count) for one, count in zip(units, keep, strict=True)]
    return [masks[0] for masks in select(problems, key_bits)]


def _first(units: Units, protected: Tensor, key_bits: int) -> Units:
    """The same units with the protected ones before all others."""
    return replace(units, keys=lambda part: units.keys(part).masked_fill_(protected[part], 2**key_bits - 1))


def _units_of_entries(weight: SparseWeight, values: Tensor | None, *, seed: int, within: bool) -> Units:
    """Single weights, each ranked on the rank that holds it."""
    shard, bits = weight.shard, weight.bits.view(-1)

    def keys(part: slice) -> Tensor:
        if values is not None:
            found = magnitude_keys(values[part])
        else:
            here = torch.arange(part.start, part.stop, dtype=torch.int64, device=bits.device)
            found = random_keys(seed, shard.name, global_index(shard, here))
        return found.bitwise_and_(bits[part]) if within else found

    return Units(
        local=shard.local_numel,
        total=shard.global_numel,
        keys=keys,
        index=lambda local: global_index(shard, local),
        group=shard.group,
        device=bits.device,
    )


def _units_of_scores(scores: Tensor) -> Units:
    """Units that every rank knows all scores of."""
    return Units(len(scores), len(scores), lambda part: scores[part].clone(), lambda local: local, None, scores.device)


def _block_scores(
    weights: Sequence[SparseWeight],
    pattern: Block,
    values: Sequence[Tensor] | None,
    largest: Sequence[float] | None,
    *,
    seed: int,
    within: bool,
) -> list[Tensor]:
    """A score for every block of every whole weight, the same on all ranks: int64 [blocks], 0 where nothing lives.

    Magnitude: the sum of |w| over the block, as integer multiples of a power of two that suits the rule's largest
    weight, plus the number of weights that live, by which blocks of living zeros come before zeroed blocks.
    """
    bits_of_one = 61 - ceil(log2(pattern.unit_size))  # so that a block's sum stays below 2^62
    sums = []
    for at, weight in enumerate(weights):
        if values is None or largest is None:
            entries = torch.ones(weight.shard.local_shape, dtype=torch.int64, device=weight.bits.device)
        else:
            entries = fixed_point(values[at], max(largest), bits_of_one).add_(1)
        sums.append(pattern.sums(weight.shard, entries.bitwise_and_(weight.bits) if within else entries))
    scores = _add_up([weight.shard for weight in weights], sums)
    if values is not None:
        return scores
    return [
        random_keys(seed, weight.shard.name, torch.arange(len(score), device=score.device)).long() * (score > 0)
        for weight, score in zip(weights, scores, strict=True)
    ]


def _add_up(shards: Sequence[WeightShard], parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum each 1-D tensor over its shard's group, with one collective a group."""
    by_group: dict[ProcessGroup | None, list[int]] = defaultdict(list)
    for at, shard in enumerate(shards):
        by_group[shard.group].append(at)
    total = list(parts)
    for group, members in by_group.items():
        if group is None:
            continue
        joined = torch.cat([parts[at] for at in members])
        dist.all_reduce(joined, group=group)
        for at, one in zip(members, torch.split(joined, [len(parts[at]) for at in members]), strict=True):
            total[at] = one
    return total


def global_index(shard: WeightShard, local: Tensor) -> Tensor:
    """Row-major index in the whole weight of given positions in the flattened local part; int64 to int64."""
    if shard.is_flat:
        return local.add(shard.slices[0].start)
    dims: list[tuple[int, int, int]] = []  # first, local size, global size; dimensions held whole joined to the outer
    for part, whole in zip(shard.slices, shard.global_shape, strict=True):
        size = part.stop - part.start
        if dims and size == whole:
            dims[-1] = (dims[-1][0] * whole, dims[-1][1] * whole, dims[-1][2] * whole)
        else:
            dims.append((part.start, size, whole))
    index, stride = torch.zeros_like(local), 1
    for at, (first, size, whole) in reversed(list(enumerate(dims))):
        index += ((local % size if at else local) + first) * stride
        local, stride = (local // size if at else local), stride * whole
    return index

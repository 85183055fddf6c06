"""Patterns: which weights are kept or zeroed together, in units.

A pattern turns the importance of single weights into scores of units, and a decision about units back into a mask of
weights. The scores are integers, so that a sum over ranks is the same in whatever order and layout it is taken.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.sharding import Rectangle, WeightShard

_CHUNK = 1 << 18  # groups that are sorted at a time: bounds the temporaries


class Pattern(Protocol):
    """The shape of what lives or dies together."""

    @property
    def unit_size(self) -> int:
        """Weights in a unit."""

    def misfit(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Why the weight cannot be cut into units, with the fix; None where it can."""

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Units of a whole weight."""


@dataclass(frozen=True)
class Unstructured:
    """Every weight on its own."""

    unit_size: int = 1

    def misfit(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Every weight fits."""
        return None

    def num_units(self, shape: tuple[int, ...]) -> int:
        """As many as weights."""
        return prod(shape)


@dataclass(frozen=True)
class Block:
    """Blocks of rows x cols over the last two dimensions of a weight; leading dimensions (experts) are separate."""

    rows: int
    cols: int

    @property
    def unit_size(self) -> int:
        """Weights in a block."""
        return self.rows * self.cols

    def misfit(self, name: str, shape: tuple[int, ...]) -> str | None:
        """A weight fits when it has two dimensions or more and the block divides the last two."""
        if len(shape) >= 2 and shape[-2] % self.rows == 0 and shape[-1] % self.cols == 0:
            return None
        return (
            f"block[{self.rows},{self.cols}] does not divide {name} of shape {list(shape)}; choose a block that "
            "divides its last two dimensions, or give this weight a rule of its own"
        )

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Blocks of a whole weight."""
        return prod(self.grid(shape))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the weight counted in blocks."""
        return (*shape[:-2], shape[-2] // self.rows, shape[-1] // self.cols)

    def sums(self, shard: WeightShard, local: Tensor) -> Tensor:
        """Sum of each block's local entries.

        Args:
            shard: Where `local` lies in the whole weight.
            local: Integers, of `shard.local_shape`.

        Returns:
            int64, one per block of the whole weight, flat and row-major; to be added up over `shard.group`.
        """
        grid = torch.zeros(self.grid(shard.global_shape), dtype=torch.int64, device=local.device)
        for box in shard.rectangles():
            above, left, below, right = self._margins(box)
            padded = F.pad(box.view(local), (left, right, above, below))
            high, wide = padded.shape[-2] // self.rows, padded.shape[-1] // self.cols
            blocks = padded.view(*box.sizes[:-2], high, self.rows, wide, self.cols)
            grid[self._blocks_of(box)] += blocks.sum((-3, -1))
        return grid.view(-1)

    def expand(self, shard: WeightShard, of_blocks: Tensor) -> Tensor:
        """Spread one bool per block of the whole weight over the entries that this rank holds: `shard.local_shape`."""
        grid = of_blocks.view(self.grid(shard.global_shape))
        local = torch.empty(shard.local_shape, dtype=torch.bool, device=of_blocks.device)
        for box in shard.rectangles():
            above, left, _, _ = self._margins(box)
            whole = grid[self._blocks_of(box)].repeat_interleave(self.rows, -2).repeat_interleave(self.cols, -1)
            height, width = box.sizes[-2:]
            box.view(local).copy_(whole[..., above : above + height, left : left + width])
        return local

    def _margins(self, box: Rectangle) -> tuple[int, int, int, int]:
        """Entries above, left, below and right of a box that complete its blocks."""
        (top, left), (height, width) = box.offsets[-2:], box.sizes[-2:]
        return top % self.rows, left % self.cols, -(top + height) % self.rows, -(left + width) % self.cols

    def _blocks_of(self, box: Rectangle) -> tuple[slice, ...]:
        """Where the blocks that a box touches lie in the grid."""
        units = (*([1] * (len(box.sizes) - 2)), self.rows, self.cols)
        return tuple(
            slice(offset // unit, -(-(offset + size) // unit))
            for offset, size, unit in zip(box.offsets, box.sizes, units, strict=True)
        )


@dataclass(frozen=True)
class Groups:
    """n of every m inputs of a matrix [outputs, inputs], the same for `vector` outputs; by some methods of every m
    outputs too. Leading dimensions (experts) are separate."""

    n: int
    m: int
    vector: int = 1
    both_ways: bool = False

    def misfit(self, name: str, shape: tuple[int, ...]) -> str | None:
        """A matrix fits when m divides its inputs, and vector, or m where groups lie along them too, its outputs."""
        outputs = self.m if self.both_ways else self.vector
        if len(shape) >= 2 and shape[-1] % self.m == 0 and shape[-2] % outputs == 0:
            return None
        if self.vector > 1:
            return (
                f"vector[{self.vector}] {self.n}:{self.m} does not divide {name} of shape {list(shape)}; its outputs "
                f"must be a multiple of {self.vector} and its inputs of {self.m}, or leave this weight out"
            )
        sizes = "both its dimensions" if self.both_ways else "its last dimension"
        return (
            f"m={self.m} does not divide {name} of shape {list(shape)}; choose a pattern n:m whose m divides {sizes}, "
            "or leave this weight out"
        )

    @property
    def units(self) -> Block:
        """What is kept or zeroed together."""
        return Block(self.vector, 1)

    def largest(self, scores: Tensor) -> Tensor:
        """The n best of every m, bool [units], of the scores of all units of a weight; ties go to the lower index."""
        mask = torch.empty(len(scores) // self.m, self.m, dtype=torch.bool, device=scores.device)
        groups = scores.view(-1, self.m)
        for part, kept in zip(torch.split(groups, _CHUNK), torch.split(mask, _CHUNK), strict=True):
            best = part.argsort(dim=1, descending=True, stable=True)[:, : self.n]
            kept.zero_().scatter_(1, best, True)
        return mask.view(-1)


def misfit(rule: SparsityRule, name: str, shape: tuple[int, ...]) -> str | None:
    """Why a rule's pattern cannot be that of a weight, with the fix; None where it can."""
    if rule.groups is not None:
        both_ways = rule.method in ("bdwp", "transposable")
        return Groups(rule.groups.n, rule.groups.m, rule.groups.vector, both_ways).misfit(name, shape)
    return pattern_of(rule).misfit(name, shape)


def pattern_of(rule: SparsityRule) -> Unstructured | Block:
    """The pattern that a rule asks for."""
    block = rule.block
    return Unstructured() if block.rows == block.cols == 1 else Block(block.rows, block.cols)

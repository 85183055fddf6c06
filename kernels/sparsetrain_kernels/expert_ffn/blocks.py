"""A block of rows through one expert, forward and backward: what passes over all experts are made of.

Shapes: R rows (here of a block), D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.activation import activate, activate_backward
from sparsetrain_kernels.expert_ffn.rounding import TILE_ROWS, check_counts
from sparsetrain_kernels.memory import new_result

Biases = Sequence[Tensor] | None

# What a block's hidden activations may take, so that they are still in a CPU's cache when they are read again; and rows
# below which products would be slow.
_BLOCK_BYTES, _FEWEST_ROWS = 16 * 2**20, 512


@dataclass(frozen=True)
class Weights:
    """Tensors of each expert: weights, or their gradients."""

    w_in: Sequence[Tensor]
    """[H, D] of each."""
    w_out: Sequence[Tensor]
    """[D, F] of each."""
    b_in: Biases = None
    """[H] of each."""
    b_out: Biases = None
    """[D] of each."""

    @classmethod
    def unstack(cls, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None) -> "Weights":
        """From tensors that hold those of all experts."""
        biases = [None if b is None else b.unbind() for b in (b_in, b_out)]
        return cls(w_in.unbind(), w_out.unbind(), *biases)

    @property
    def dim(self) -> int:
        """D."""
        return self.w_out[0].shape[0]

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.w_out[0].shape[1]

    @property
    def in_dim(self) -> int:
        """H."""
        return self.w_in[0].shape[0]


class Block(NamedTuple):
    """Some of the rows of an expert."""

    expert: int
    rows: slice
    is_first: bool
    """Whether they are the expert's first."""


def blocks(counts: Sequence[int], num_rows: int, row_bytes: int) -> list[Block]:
    """Cut the rows of each expert into blocks that fit a cache, of much the same size and of whole tiles.

    Args:
        counts: Rows of each expert; none for some, maybe.
        num_rows: R.
        row_bytes: What a row takes there.

    Raises:
        ValueError: The counts do not add up to R.
    """
    check_counts(counts, num_rows)
    most = max(_FEWEST_ROWS, _BLOCK_BYTES // row_bytes)
    found = []
    for expert, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        size = ceil(count / max(1, ceil(count / most)) / TILE_ROWS) * TILE_ROWS
        for first in range(end - count, end, max(size, 1)):
            found.append(Block(expert, slice(first, min(first + size, end)), first == end - count))
    return found


class Scratch:
    """Memory for the intermediate results of one block after the other.

    Args:
        like: Gives dtype and device.
        blocks: What it is for.
    """

    def __init__(self, like: Tensor, blocks: Sequence[Block]) -> None:
        self._like = like
        self._num_rows = max((block.rows.stop - block.rows.start for block in blocks), default=0)
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, block: Block, dim: int) -> Tensor:
        """The buffer of that name, [rows of the block, dim]; what it held is lost."""
        if name not in self._buffers:
            self._buffers[name] = new_result(self._like, self._num_rows, dim)
        return self._buffers[name][: block.rows.stop - block.rows.start]


def forward_block(
    block: Block, x_RD: Tensor, weights: Weights, activation: str, scratch: Scratch, h_RH: Tensor, y_RD: Tensor
) -> None:
    """Write the expert's hidden activations, before their nonlinearity, to `h_RH` and its output to `y_RD`."""
    e = block.expert
    _linear(x_RD, weights.w_in[e], None if weights.b_in is None else weights.b_in[e], h_RH)
    a_RF = activate(h_RH, activation, scratch.take("a", block, weights.hidden_dim))
    _linear(a_RF, weights.w_out[e], None if weights.b_out is None else weights.b_out[e], y_RD)


def backward_block(
    block: Block,
    dy_RD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    weights: Weights,
    activation: str,
    scratch: Scratch,
    gradients: Weights | None,
    add: bool,
    dx_RD: Tensor,
) -> None:
    """Write the gradient by x to `dx_RD`, and those by the weights to `gradients`, or `add` them to what is there."""
    e = block.expert
    da_RF = torch.mm(dy_RD, weights.w_out[e], out=scratch.take("da", block, weights.hidden_dim))
    a_RF, dh_RH = (scratch.take(name, block, dim) for name, dim in (("a", weights.hidden_dim), ("dh", weights.in_dim)))
    activate_backward(da_RF, h_RH, activation, a_RF, dh_RH)
    torch.mm(dh_RH, weights.w_in[e], out=dx_RD)
    if gradients is None:
        return
    _outer(dy_RD, a_RF, add, gradients.w_out[e])
    _outer(dh_RH, x_RD, add, gradients.w_in[e])
    for d_RX, biases in ((dh_RH, gradients.b_in), (dy_RD, gradients.b_out)):
        if biases is not None:
            summed = d_RX.sum(0, dtype=biases[e].dtype)
            biases[e].add_(summed) if add else biases[e].copy_(summed)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x weightᵀ + bias."""
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.mT, out=out)


def _outer(left_RM: Tensor, right_RN: Tensor, add: bool, out_MN: Tensor) -> None:
    """Write leftᵀ right, or add it, in the dtype of `out_MN`."""
    if out_MN.dtype != left_RM.dtype:
        product = torch.mm(left_RM.mT, right_RN)
        out_MN.add_(product) if add else out_MN.copy_(product)
    elif add:
        out_MN.addmm_(left_RM.mT, right_RN)
    else:
        torch.mm(left_RM.mT, right_RN, out=out_MN)

"""The config's attention patterns as the block layouts that kernels take."""

from functools import lru_cache, reduce
from operator import and_, or_

import torch
from sparsetrain_kernels import BlockLayout
from sparsetrain_kernels.block_layout import patterns

from sparsetrain.config import attention as written
from sparsetrain.config.attention import BlockSparseAttention


def pattern_of(config: written.PatternConfig) -> patterns.Pattern:
    """The pattern that a section of `model.attention.heads` describes."""
    match config:
        case written.DensePattern():
            return patterns.Dense()
        case written.Local(width=width):
            return patterns.Local(width)
        case written.Sink(width=width):
            return patterns.Sink(width)
        case written.Strided(stride=stride, offset=offset):
            return patterns.Strided(stride, offset)
        case written.Dilated(width=width, dilation=dilation):
            return patterns.Dilated(width, dilation)
        case written.Random(count=count, seed=seed):
            return patterns.Random(count, seed)
        case written.Union(of=parts):
            return reduce(or_, map(pattern_of, parts))
        case written.Intersection(of=parts):
            return reduce(and_, map(pattern_of, parts))


def attention_layout(
    config: BlockSparseAttention, num_heads: int, num_tokens: int, *, allow_empty: bool = False
) -> BlockLayout:
    """Lay the patterns of all heads out over a sequence, causally, on the CPU.

    Args:
        config: The patterns.
        num_heads: Query heads of the model.
        num_tokens: Length of the sequence; need not be a multiple of the block.
        allow_empty: Accept queries that see no key.

    Raises:
        ValueError: A block of queries sees no key.
    """
    each = [pattern_of(pattern) for pattern in config.head_patterns(num_heads)]
    with torch.device("cpu"):
        return BlockLayout.build(each, num_tokens, block=config.block, causal=True, allow_empty=allow_empty)


class AttentionLayouts:
    """The layouts of a model at the lengths it is called with, each built once for each device.

    What a block of queries sees does not depend on what comes after it, so samples of as many blocks share a layout.

    Args:
        config: The patterns.
        num_heads: Query heads of the model.
    """

    def __init__(self, config: BlockSparseAttention, num_heads: int) -> None:
        self._config = config
        self._num_heads = num_heads
        self._built: dict[tuple[int, torch.device], BlockLayout] = {}

    def at(self, num_tokens: int, device: torch.device) -> BlockLayout:
        """The layout for samples of `num_tokens`, on a device."""
        num_blocks = -(-num_tokens // self._config.block)
        self._build(num_blocks, device)
        return self._built[num_blocks, device]

    # torch.compile does this while it traces, and what it compiles finds the layout in its place.
    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def _build(self, num_blocks: int, device: torch.device) -> None:
        if (num_blocks, device) not in self._built:
            layout = attention_layout(self._config, self._num_heads, num_blocks * self._config.block)
            self._built[num_blocks, device] = layout.to(device)


@lru_cache(maxsize=16)
def shared_layouts(config: BlockSparseAttention, num_heads: int) -> AttentionLayouts:
    """The same `AttentionLayouts` for all layers, and models, that are alike."""
    return AttentionLayouts(config, num_heads)

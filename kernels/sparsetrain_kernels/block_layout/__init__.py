"""Which blocks of keys each block of queries sees, head by head: `BlockLayout`, and the patterns it is built from."""

from sparsetrain_kernels.block_layout.layout import BlockLayout
from sparsetrain_kernels.block_layout.patterns import (
    PATTERNS,
    Dense,
    Dilated,
    Document,
    Explicit,
    Local,
    Pattern,
    Random,
    Sink,
    Strided,
)

__all__ = [
    "PATTERNS",
    "BlockLayout",
    "Dense",
    "Dilated",
    "Document",
    "Explicit",
    "Local",
    "Pattern",
    "Random",
    "Sink",
    "Strided",
]

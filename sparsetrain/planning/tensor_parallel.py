"""Which weights of a model tensor parallelism cuts, and where; known without the library that does it."""

import re

_CUT = {
    0: re.compile(r"embed|head|.*\.(attention\.[qkv]|ffn\.(gate|up))"),
    1: re.compile(r".*\.(attention\.o|ffn\.down)"),
}
"""The modules of which tensor parallelism cuts the weight, by the dimension that it cuts."""


def cut_dim(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks share a weight; None where each has all of it."""
    module, _, leaf = name.rpartition(".")
    if _CUT[0].fullmatch(module):
        return 0
    return 1 if _CUT[1].fullmatch(module) and leaf == "weight" else None


def part_shape(name: str, shape: tuple[int, ...], num_ranks: int) -> tuple[int, ...]:
    """Shape of what each of `num_ranks` tensor-parallel ranks has of a weight."""
    dim = cut_dim(name)
    return tuple(size // num_ranks if at == dim else size for at, size in enumerate(shape))

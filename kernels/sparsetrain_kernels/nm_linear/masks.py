"""Which weights n:m sparsity keeps: the largest magnitudes, ties to the lower index, so equally on every device.

G groups of `vector` outputs, K inputs, P = K·n/m kept inputs of a group.
"""

import itertools
from functools import cache

import torch
from torch import Tensor

from sparsetrain_kernels.nm_linear.pattern import MAX_M, NMPattern

_CHUNK = 1 << 16  # groups at a time: bounds the temporaries, and keeps those of 2:4 in cache


def magnitude_mask(weight_NK: Tensor, pattern: NMPattern) -> Tensor:
    """The n largest magnitudes of every m, summed over the outputs of a group, as bool [G, K]; NaN counts as largest.

    Raises:
        ValueError: The pattern does not divide the weight.
    """
    pattern.check(*weight_NK.shape)
    scores_GK = weight_NK.detach().abs()
    if pattern.vector > 1:
        accurate = torch.promote_types(weight_NK.dtype, torch.float32)
        scores_GK = scores_GK.unflatten(0, (-1, pattern.vector)).sum(1, dtype=accurate)  # type: ignore[no-untyped-call]
    if (pattern.n, pattern.m) == (2, 4):
        return mask_of_codes(codes_2_4(scores_GK)).view(scores_GK.shape)
    return _largest(scores_GK, pattern.n, pattern.m)


def _largest(scores_GK: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros(scores_GK.numel() // m, m, dtype=torch.bool, device=scores_GK.device)
    for groups, kept in zip(torch.split(scores_GK.reshape(-1, m), _CHUNK), torch.split(mask, _CHUNK), strict=True):
        if groups.dtype == torch.float64:
            indices = groups.argsort(stable=True, dim=1, descending=True)[:, :n]
        else:
            # The bits of a non-negative float grow with it; the place in the group, inverted, makes all keys different.
            places = torch.arange(MAX_M - 1, MAX_M - 1 - m, -1, device=groups.device)
            keys = groups.float().view(torch.int32).long() * MAX_M + places
            indices = keys.topk(n, 1, sorted=False).indices
        kept.scatter_(1, indices, True)
    return mask.view(scores_GK.shape)


def codes_2_4(weight: Tensor) -> Tensor:
    """Of every four magnitudes the two largest, one uint8 each: bit i says that entry i is kept; flat.

    A tournament: entry i is kept when it wins at least two of its three comparisons.
    """
    fours = weight.detach().reshape(-1, 4)
    codes = torch.empty(len(fours), dtype=torch.uint8, device=weight.device)
    for start in range(0, len(fours), _CHUNK):
        a, b, c, d = _ordered(fours[start : start + _CHUNK].T.contiguous()).unbind()
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        kept = (
            _two_of(ab, ac, ad),
            _two_of(~ab, bc, bd),
            _two_of(~ac, ~bc, cd),
            _two_of(~ad, ~bd, ~cd),
        )
        first, second, third, fourth = (flags.view(torch.uint8) for flags in kept)
        codes[start : start + _CHUNK] = first | second << 1 | third << 2 | fourth << 3
    return codes


def _ordered(values: Tensor) -> Tensor:
    """Integers in the order of the values' magnitudes: the bits without the sign; NaN comes last."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])
    return bits & torch.iinfo(bits.dtype).max


def _two_of(one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    return (one & two) | (three & (one | two))


def mask_of_codes(codes: Tensor) -> Tensor:
    """The mask that codes stand for, bool, flat."""
    return _lookup(_mask_table(codes.device), codes).view(torch.bool)


def offsets_of_codes(codes: Tensor) -> Tensor:
    """Places of the two kept entries in each four, uint8, flat."""
    return _lookup(_offset_table(codes.device), codes).view(torch.uint8)


def _lookup(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.int())


@cache
def _mask_table(device: torch.device) -> Tensor:
    """Four bools as one int32, by code."""
    bits = [[code >> entry & 1 for entry in range(4)] for code in range(16)]
    return torch.tensor(bits, dtype=torch.uint8).view(torch.int32).flatten().to(device)


@cache
def _offset_table(device: torch.device) -> Tensor:
    """Two uint8 as one int16, by code; codes of other than two entries do not occur."""
    kept = [([entry for entry in range(4) if code >> entry & 1] + [0, 0])[:2] for code in range(16)]
    return torch.tensor(kept, dtype=torch.uint8).view(torch.int16).flatten().to(device)


def transposable_mask(weight_NK: Tensor) -> Tensor:
    """2:4 along inputs and outputs alike, bool [N, K]: of the 90 masks of each 4 x 4 the one that retains most |w|.

    Ties go to the mask that comes first when masks are read as binary numbers, largest first.

    Raises:
        ValueError: 4 does not divide both sizes.
    """
    num_outputs, num_inputs = weight_NK.shape
    if num_outputs % 4 or num_inputs % 4:
        raise ValueError(f"weight is {list(weight_NK.shape)}: a transposable 2:4 mask needs multiples of 4 both ways")
    accurate = torch.promote_types(weight_NK.dtype, torch.float32)
    masks = _transposable_masks().to(weight_NK.device)
    squares = weight_NK.detach().view(num_outputs // 4, 4, num_inputs // 4, 4).transpose(1, 2).reshape(-1, 16).abs()
    retained = (part.to(accurate) @ masks.to(accurate).T for part in torch.split(squares, _CHUNK // 4))
    best = torch.cat([sums.argmax(1) for sums in retained])
    by_square = masks[best].view(num_outputs // 4, num_inputs // 4, 4, 4)
    return by_square.transpose(1, 2).reshape(num_outputs, num_inputs)


@cache
def _transposable_masks() -> Tensor:
    """All 4 x 4 masks with two entries in each row and column, bool [90, 16]."""
    rows = [row for row in itertools.product((True, False), repeat=4) if sum(row) == 2]
    squares = [
        square for square in itertools.product(rows, repeat=4) if set(map(sum, zip(*square, strict=True))) == {2}
    ]
    return torch.tensor(squares).view(-1, 16)

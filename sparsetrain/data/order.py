"""The order of training samples: pure functions of (seed, global sample index), with nothing to store or to replay.

Shuffling is a keyed bijection of the numbers below n (a Feistel network over a grid, cf. format-preserving
encryption), so any stretch of the order can be computed by itself: ranks take their rows of a batch, a resumed run
goes on at its index, and within an epoch every sample comes exactly once.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4
_MAX_CYCLE = 100_800  # 2^6 · 3^2 · 5^2 · 7: whole numbers of slots for percentages, thirds, sevenths and eighths

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)

Words = NDArray[np.uint64]


def mix(words: Words) -> Words:
    """SplitMix64: scatter 64-bit numbers; a bijection, element by element."""
    words = words + _GOLDEN
    words = (words ^ (words >> _SHIFT_1)) * _MIX_1
    words = (words ^ (words >> _SHIFT_2)) * _MIX_2
    return words ^ (words >> _SHIFT_3)


def derive_keys(seed: int, stream: int, epochs: NDArray[np.int64]) -> Words:
    """Keys of independent shuffles, one for each (seed, stream, epoch): uint64, the shape of `epochs`."""
    key = mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(stream))
    return mix(key ^ mix(epochs.astype(np.uint64)))


def permute(indices: NDArray[np.int64], size: int, keys: Words) -> NDArray[np.int64]:
    """Where each index goes in a shuffle of the numbers below `size`: for one key, a bijection.

    Args:
        indices: [n] int64, each in [0, size).
        size: How many numbers are shuffled.
        keys: [n] uint64, the shuffle to use for each index.

    Returns:
        [n] int64, each in [0, size).
    """
    # The smallest grid that holds them all. The few indices that land in its surplus cells go round again, which
    # keeps the mapping a bijection of the rest.
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    shuffled = _shuffle_cells(indices.astype(np.uint64), rows, columns, keys)
    while (outside := shuffled >= size).any():
        shuffled[outside] = _shuffle_cells(shuffled[outside], rows, columns, keys[outside])
    return shuffled.astype(np.int64)


def _shuffle_cells(cells: Words, rows: int, columns: int, keys: Words) -> Words:
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cells, num_columns)
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        row = (row + mix(column ^ keys) % num_rows) % num_rows
        column = (column + mix(row ^ ~keys) % num_columns) % num_columns
    return row * num_columns + column


class Draw(NamedTuple):
    """Where training samples come from."""

    source: NDArray[np.int64]
    """[n] index of the source."""
    sample: NDArray[np.int64]
    """[n] sample within that source."""


class SampleOrder:
    """Maps a global sample index to a source and a sample of it.

    Sources are mixed in cycles of a fixed length, in each of which every source has exactly its share of the slots: a
    shuffled pattern, begun at another place in each cycle. Each source is shuffled anew whenever it has been read
    through, at its own pace.

    Args:
        num_samples: Samples in each source, all positive.
        weights: Relative shares of the sources. Realised to within 1/100800 of the total, exactly when they are
            simple fractions (percent, thirds, sevenths, eighths).
        seed: Seed of the run.
    """

    def __init__(self, num_samples: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._num_samples = tuple(num_samples)
        self._seed = seed
        self.slots = mixture_slots(weights)
        self._pattern = _shuffled_pattern(self.slots, seed)
        turns = self._pattern == np.arange(len(self.slots))[:, None]
        self._turns_before = np.pad(np.cumsum(turns, axis=1, dtype=np.int64), ((0, 0), (1, 0)))

    def draw(self, first: int, count: int) -> Draw:
        """The samples with global indices first … first + count − 1, in that order."""
        source, turn = self._turns(np.arange(first, first + count, dtype=np.int64))
        sample = np.empty_like(turn)
        for number, size in enumerate(self._num_samples):
            rows = source == number
            epoch, position = np.divmod(turn[rows], size)
            sample[rows] = permute(position, size, derive_keys(self._seed, number + 1, epoch))
        return Draw(source, sample)

    def _turns(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each index, and how many samples have been taken from that source in its order before it."""
        length = self._pattern.size
        cycle, slot = np.divmod(indices, length)
        start = (derive_keys(self._seed, 0, cycle) % np.uint64(length)).astype(np.int64)
        place = (start + slot) % length
        source = self._pattern[place]
        share = np.asarray(self.slots, dtype=np.int64)[source]
        # Turns of this source from the start of the cycle to here, round the end of the pattern where need be.
        turn = (self._turns_before[source, place] - self._turns_before[source, start]) % share
        return source, cycle * share + turn


def _shuffled_pattern(slots: Sequence[int], seed: int) -> NDArray[np.int64]:
    """The source at each place of the mixing pattern: int64 [sum(slots)]."""
    length = sum(slots)
    ordered = np.repeat(np.arange(len(slots)), slots)
    keys = derive_keys(seed, 0, np.full(length, -1))
    return ordered[permute(np.arange(length), length, keys)]


def mixture_slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Slots of each source in a mixing cycle: largest remainders of 100800, at least one each, in lowest terms."""
    shares = [Fraction(weight) / sum(map(Fraction, weights)) * _MAX_CYCLE for weight in weights]
    slots = [max(1, math.floor(share)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (slots[i] - shares[i], i))
    for i in by_remainder[: max(0, _MAX_CYCLE - sum(slots))]:
        slots[i] += 1
    divisor = math.gcd(*slots)
    return tuple(slot // divisor for slot in slots)

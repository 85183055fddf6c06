"""Exact selection of the largest of many keys that lie on many ranks, without bringing them together.

Ranks agree on a threshold digit by digit (a radix search): each counts its keys by their leading digit, the counts are
added up over the group, and whoever holds the last entry to keep is looked at digit by digit further. Many problems
share each sum. Equal keys at the threshold are told apart by a second search of the same kind, over their positions.
Every decision rests on integer sums, so all layouts decide the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_DIGIT_BITS = 11
"""2048 counters: they fit a core's first-level cache, and 31-bit keys need three passes."""

_CPU_CHUNK = 2**18
"""Keys looked at together on a CPU: what is computed from them stays in the second-level cache."""
_DEVICE_CHUNK = 2**26
"""And elsewhere: enough to fill the device, little beside the model."""


@dataclass(frozen=True)
class Units:
    """One weight's units that are ranked on this rank; together over `group` they are the whole weight's."""

    local: int
    """Units ranked here; may be 0."""
    total: int
    """Units of the whole weight."""
    keys: Callable[[slice], Tensor]
    """Keys of a range of the local units: int32 or int64, 1-D, in [0, 2^key_bits). Computed anew at each call."""
    index: Callable[[Tensor], Tensor]
    """Global index in the weight of given local units: int64 to int64."""
    group: ProcessGroup | None
    device: torch.device

    def chunks(self) -> Iterator[slice]:
        """Ranges that cover the local units in order."""
        size = _CPU_CHUNK if self.device.type == "cpu" else _DEVICE_CHUNK
        return (slice(start, min(start + size, self.local)) for start in range(0, self.local, size))

    def pieces(self) -> Iterator[Tensor]:
        """All local keys, chunk by chunk."""
        return map(self.keys, self.chunks())


@dataclass(frozen=True)
class Problem:
    """Keep the `keep` units with the largest keys; among equal keys those of earlier parts, then of smaller index."""

    parts: Sequence[Units]
    keep: int


@dataclass(frozen=True)
class _Cut:
    """Where a problem's kept keys end."""

    threshold: int
    """Smallest key of which some are kept."""
    kept: int
    """How many units with exactly that key are kept."""
    tied: int
    """How many units have exactly that key."""


def select(problems: Sequence[Problem], key_bits: int) -> list[list[Tensor]]:
    """Solve several problems at once, exactly.

    Collective over the groups of the parts: all their ranks must pass the same problems in the same order.

    Args:
        problems: Each with 0 <= keep <= its number of units.
        key_bits: All keys lie in [0, 2^key_bits); 31 for int32 keys, 63 for int64.

    Returns:
        For each part of each problem a bool mask of its local units. Over all ranks exactly `keep` are True.
    """
    cuts = _cuts(problems, [[part.pieces for part in problem.parts] for problem in problems], key_bits)
    masks = [[_mask(part, cut) for part in problem.parts] for problem, cut in zip(problems, cuts, strict=True)]
    tied = [at for at, cut in enumerate(cuts) if 0 < cut.kept < cut.tied]
    if tied:
        _keep_first_ties([problems[at] for at in tied], [cuts[at] for at in tied], [masks[at] for at in tied])
    return masks


def _mask(part: Units, cut: _Cut) -> Tensor:
    """Keys above the threshold, and those equal to it when all of them are kept."""
    mask = torch.empty(part.local, dtype=torch.bool, device=part.device)
    compare = torch.ge if cut.kept == cut.tied else torch.gt
    for chunk in part.chunks():
        compare(part.keys(chunk), cut.threshold, out=mask[chunk])
    return mask


def _keep_first_ties(problems: Sequence[Problem], cuts: Sequence[_Cut], masks: Sequence[Sequence[Tensor]]) -> None:
    """Add to the masks the first `kept` of each problem's ties, in the order of parts and indices."""
    ties: list[list[Tensor]] = []
    places: list[list[Tensor]] = []
    for problem, cut in zip(problems, cuts, strict=True):
        last = sum(part.total for part in problem.parts) - 1
        ties.append([_units_with_key(part, cut.threshold) for part in problem.parts])
        places.append([])
        for part, units in zip(problem.parts, ties[-1], strict=True):
            places[-1].append(last - part.index(units))  # the earlier, the larger
            last -= part.total
    order = [Problem(problem.parts, cut.kept) for problem, cut in zip(problems, cuts, strict=True)]
    bits = max(sum(part.total for part in problem.parts) for problem in problems).bit_length()
    found = _cuts(order, [[partial(list, [keys]) for keys in row] for row in places], bits)
    for row_of_masks, row_of_ties, row_of_places, cut in zip(masks, ties, places, found, strict=True):
        for mask, units, place in zip(row_of_masks, row_of_ties, row_of_places, strict=True):
            mask[units[place >= cut.threshold]] = True


def _units_with_key(part: Units, key: int) -> Tensor:
    found = [(part.keys(chunk) == key).nonzero().view(-1) + chunk.start for chunk in part.chunks()]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=part.device)


_Keys = Callable[[], Iterable[Tensor]]
"""A part's keys, in pieces."""


def _cuts(problems: Sequence[Problem], keys: Sequence[Sequence[_Keys]], key_bits: int) -> list[_Cut]:
    """Find every problem's threshold, the leading digit first."""
    prefix = [0] * len(problems)
    kept, tied = [problem.keep for problem in problems], [0] * len(problems)
    keys = [list(row) for row in keys]
    remaining = key_bits
    while remaining:
        width = min(_DIGIT_BITS, remaining)
        remaining -= width
        counts = _count_digits(problems, keys, remaining, width)
        digits, kept, tied = _descend(counts, kept)
        prefix = [high << width | digit for high, digit in zip(prefix, digits, strict=True)]
        if remaining:
            keys = [
                [_with_prefix(pieces, remaining, high) for pieces in row]
                for row, high in zip(keys, prefix, strict=True)
            ]
    return [_Cut(*cut) for cut in zip(prefix, kept, tied, strict=True)]


def _count_digits(problems: Sequence[Problem], keys: Sequence[Sequence[_Keys]], shift: int, width: int) -> Tensor:
    """How many units of each problem have each value of the digit above `shift`: int64 [problem, 2^width]."""
    shape = (len(problems), 2**width)
    sums: dict[ProcessGroup | None, Tensor] = {}
    for row, (problem, pieces_of_parts) in enumerate(zip(problems, keys, strict=True)):
        for part, pieces in zip(problem.parts, pieces_of_parts, strict=True):
            if part.group not in sums:
                sums[part.group] = torch.zeros(shape, dtype=torch.int64, device=part.device)
            for piece in pieces():
                sums[part.group][row] += torch.bincount((piece >> shift).bitwise_and_(2**width - 1), minlength=2**width)
    for group, counts in sums.items():
        if group is not None:
            dist.all_reduce(counts, group=group)
    return torch.stack(list(sums.values())).sum(0)


def _descend(counts: Tensor, keep: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """For each problem: the digit of the last unit to keep, how many to keep among those with it, how many have it."""
    wanted = torch.tensor(keep, device=counts.device).unsqueeze(1)
    at_least = counts.flip(1).cumsum(1).flip(1)
    digit = (at_least >= wanted).sum(1, keepdim=True) - 1
    having = counts.gather(1, digit)
    kept = wanted - (at_least.gather(1, digit) - having)
    found: list[list[int]] = torch.cat([digit, kept, having], 1).T.tolist()
    return found[0], found[1], found[2]


def _with_prefix(pieces: _Keys, shift: int, prefix: int) -> _Keys:
    """The keys that begin with `prefix`."""
    return partial(list, [piece[(piece >> shift) == prefix] for piece in pieces()])

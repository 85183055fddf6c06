"""Compressed lists of blocks: of each row of blocks its columns (CSR), or of each column its rows (CSC).

Shapes: H heads (1 where all share one list), L lines (rows for CSR, columns for CSC), C crossing lines, N the most
blocks of any head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NO_KEY = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class BlockList:
    """The blocks of each line, ascending."""

    num_crossing: int
    """C."""
    indptr: Tensor
    """int32 [H, L + 1]: line l of head h holds entries indptr[h, l] to indptr[h, l + 1] − 1."""
    indices: Tensor
    """int32 [H, N]: the crossing line of each entry; 0 after a head's last."""
    keys: Tensor
    """int64 [H, N]: line · C + index of each entry, ascending; the largest integer after a head's last."""

    @classmethod
    def compress(cls, mask: Tensor) -> "BlockList":
        """List the True entries of a bool mask [H, L, C]."""
        num_heads, num_lines, num_crossing = mask.shape
        counts = mask.sum(-1)
        indptr = torch.zeros(num_heads, num_lines + 1, dtype=torch.int32, device=mask.device)
        indptr[:, 1:] = counts.cumsum(-1)
        per_head = counts.sum(-1)
        head, line, crossing = mask.nonzero(as_tuple=True)
        place = torch.arange(len(head), device=mask.device) - (per_head.cumsum(0) - per_head)[head]
        width = max(1, int(per_head.max()))  # never empty, so that any kernel may form its address
        indices = torch.zeros(num_heads, width, dtype=torch.int32, device=mask.device)
        keys = torch.full((num_heads, width), _NO_KEY, device=mask.device)
        indices[head, place] = crossing.int()
        keys[head, place] = line * num_crossing + crossing
        return cls(num_crossing, indptr, indices, keys)

    @property
    def num_lines(self) -> int:
        """L."""
        return self.indptr.shape[1] - 1

    def expand(self) -> Tensor:
        """The bool mask [H, L, C] that this was compressed from."""
        num_heads = len(self.indptr)
        mask = torch.zeros(num_heads, self.num_lines * self.num_crossing, dtype=torch.bool, device=self.keys.device)
        head, place = (self.keys != _NO_KEY).nonzero(as_tuple=True)
        mask[head, self.keys[head, place]] = True
        return mask.view(num_heads, self.num_lines, self.num_crossing)

    def positions(self, crossing: Tensor) -> Tensor:
        """Where in each line the entries at or after given crossing lines begin.

        Args:
            crossing: Integers [V, L, P] in 0 … C: P of them for each line, in V variants.

        Returns:
            int32 [V, H, L, P], positions in `indices`.
        """
        num_variants, num_lines, num_points = crossing.shape
        lines = torch.arange(num_lines, device=crossing.device)[:, None] * self.num_crossing
        wanted = (crossing + lines).reshape(1, -1).expand(len(self.keys), -1).contiguous()
        found = torch.searchsorted(self.keys, wanted, out_int32=True)
        return found.view(-1, num_variants, num_lines, num_points).transpose(0, 1).contiguous()

    def to(self, device: torch.device | str) -> "BlockList":
        """Copy on a device."""
        return BlockList(self.num_crossing, *(t.to(device) for t in (self.indptr, self.indices, self.keys)))

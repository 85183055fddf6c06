"""`NMSelection`: the inputs that each output of one weight keeps.

N outputs in G groups of `vector`, K inputs, P = K·n/m kept inputs of a group.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparsetrain_kernels.nm_linear import masks
from sparsetrain_kernels.nm_linear.pattern import NMPattern


@dataclass(frozen=True, eq=False)
class NMSelection:
    """Build it with `largest`, `transposable`, `from_mask` or `from_columns`; when masks move, build a new one."""

    pattern: NMPattern
    mask_GK: Tensor
    """bool [G, K]: what each group of outputs keeps."""
    is_transposable: bool = False
    """Whether the transposed mask is 2:4 too, so that the input gradient may use sparse tensor cores."""

    @classmethod
    def largest(cls, weight_NK: Tensor, pattern: NMPattern) -> "NMSelection":
        """The largest magnitudes of a weight; ties go to the lower index.

        Raises:
            ValueError: The pattern does not divide the weight.
        """
        return cls(pattern, masks.magnitude_mask(weight_NK, pattern))

    @classmethod
    def transposable(cls, weight_NK: Tensor) -> "NMSelection":
        """2:4 along both dimensions, of the largest sum of magnitudes in each 4 x 4.

        Raises:
            ValueError: 4 does not divide both sizes.
        """
        return cls(NMPattern(2, 4), masks.transposable_mask(weight_NK), is_transposable=True)

    @classmethod
    def from_mask(cls, mask_NK: Tensor, pattern: NMPattern) -> "NMSelection":
        """What a mask [N, K] keeps, which must follow the pattern.

        Raises:
            ValueError: It does not.
        """
        pattern.check(*mask_NK.shape)
        by_group = mask_NK.view(-1, pattern.vector, mask_NK.shape[1])
        if not bool((by_group == by_group[:, :1]).all()):
            raise ValueError(
                f"mask: the {pattern.vector} outputs of a group differ, but {pattern} says that they are equal"
            )
        return cls(pattern, by_group[:, 0].contiguous()).validated()

    @classmethod
    def from_columns(cls, columns_GP: Tensor, num_inputs: int, pattern: NMPattern) -> "NMSelection":
        """What a list of kept inputs says, such as one that was loaded.

        Raises:
            ValueError: An index is out of range, or the pattern is not followed.
        """
        if columns_GP.numel() and (int(columns_GP.min()) < 0 or int(columns_GP.max()) >= num_inputs):
            raise ValueError(
                f"columns hold {int(columns_GP.min())} to {int(columns_GP.max())}: the weight's inputs are 0 to "
                f"{num_inputs - 1}; these indices belong to another weight or are damaged"
            )
        mask = torch.zeros(len(columns_GP), num_inputs, dtype=torch.bool, device=columns_GP.device)
        return cls(pattern, mask.scatter_(1, columns_GP.long(), True)).validated()

    def validated(self) -> "NMSelection":
        """Itself, if every group of m keeps n.

        Raises:
            ValueError: One does not.
        """
        self.pattern.check(*self.shape)
        kept = self.mask_GK.view(len(self.mask_GK), -1, self.pattern.m).sum(-1)
        wrong = (kept != self.pattern.n).nonzero()
        if len(wrong):
            group, place = wrong[0].tolist()
            raise ValueError(
                f"mask keeps {int(kept[group, place])} of inputs {place * self.pattern.m} to "
                f"{(place + 1) * self.pattern.m - 1} of group {group}: {self.pattern} keeps {self.pattern.n} "
                f"({len(wrong)} such places)"
            )
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return len(self.mask_GK) * self.pattern.vector, self.mask_GK.shape[1]

    @cached_property
    def columns_GP(self) -> Tensor:
        """Kept inputs of each group, ascending, int32 [G, P]."""
        num_kept = self.mask_GK.shape[1] // self.pattern.m * self.pattern.n
        return self.mask_GK.nonzero()[:, 1].int().view(len(self.mask_GK), num_kept)

    def mask(self) -> Tensor:
        """What each output keeps, bool [N, K]."""
        return self.mask_GK.repeat_interleave(self.pattern.vector, 0)

    def compress(self, weight_NK: Tensor) -> Tensor:
        """The kept weights, [N, P] in the order of `columns_GP`; differentiable."""
        return weight_NK.gather(1, self._columns_NP())

    def expand(self, values_NP: Tensor) -> Tensor:
        """The weight [N, K] of compressed values, zero elsewhere; differentiable."""
        return values_NP.new_zeros(self.shape).scatter(1, self._columns_NP(), values_NP)

    def to(self, device: torch.device | str) -> "NMSelection":
        """The same selection on another device."""
        return replace(self, mask_GK=self.mask_GK.to(device))

    def _columns_NP(self) -> Tensor:
        return self.columns_GP.long().repeat_interleave(self.pattern.vector, 0)

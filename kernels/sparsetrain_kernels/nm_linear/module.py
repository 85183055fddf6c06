"""`NMLinear`: nn.Linear with n:m sparse weights."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain_kernels.nm_linear import masks
from sparsetrain_kernels.nm_linear.op import nm_linear
from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.nm_linear.selection import NMSelection


class NMLinear(nn.Linear):
    """Takes the place of nn.Linear: same parameters under the same names, and a mask of what is kept as a buffer.

    The parameter stays whole and no entry is changed; the forward pass ignores what the mask does not keep. Call
    `refresh` when masks should follow the weights.

    Args:
        in_features: K, a multiple of the pattern's m.
        out_features: N, a multiple of the pattern's vector.
        pattern: Such as NMPattern(2, 4), or its text such as "vector 1:4".
        bias: Whether there is one.
        transposable: Keep masks whose transpose is 2:4 too; for pattern 2:4 alone.
        straight_through: Give weights that are not kept the gradient as if they were, so that they may return;
            otherwise it is zero.
        tokens_last: How to store results; see `nm_linear`. True is faster for the first layers of an MLP of vectors on
            a CPU, whose last layer reads them so.
        device: As in nn.Linear.
        dtype: As in nn.Linear.

    Raises:
        ValueError: The pattern does not divide the weight, or cannot be transposable.
    """

    mask: Tensor
    """bool [N / vector, K]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: NMPattern | str,
        bias: bool = True,
        *,
        transposable: bool = False,
        straight_through: bool = True,
        tokens_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.pattern = NMPattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.pattern.check(out_features, in_features)
        if transposable and self.pattern != NMPattern(2, 4):
            raise ValueError(f"transposable=True: masks of {self.pattern} are not; use 2:4")
        self.transposable = transposable
        self.straight_through = straight_through
        self.tokens_last = tokens_last
        self._selection: NMSelection | None = None
        mask_shape = out_features // self.pattern.vector, in_features
        self.register_buffer("mask", torch.empty(mask_shape, dtype=torch.bool, device=self.weight.device))
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]
        self.refresh()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        pattern: NMPattern | str,
        *,
        transposable: bool = False,
        straight_through: bool = True,
        tokens_last: bool = False,
    ) -> "NMLinear":
        """A layer that shares the parameters of a dense one and keeps its largest weights."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            pattern,
            linear.bias is not None,
            transposable=transposable,
            straight_through=straight_through,
            tokens_last=tokens_last,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.mask = torch.empty_like(layer.mask, device=linear.weight.device)
        layer.refresh()
        return layer

    def to_linear(self) -> nn.Linear:
        """A dense layer with zeros in place of what is not kept."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(torch.where(self.selection.mask(), self.weight.detach(), 0))
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return linear

    def refresh(self) -> int:
        """Keep the largest weights of now.

        Returns:
            How many entries of the mask changed sides; 0 on the meta device.
        """
        if self.mask.is_meta:
            return 0
        before = self.mask
        if self.transposable:
            self.mask = masks.transposable_mask(self.weight)
        else:
            self.mask = masks.magnitude_mask(self.weight, self.pattern)
        self._select()
        return int((before != self.mask).sum())

    @property
    def selection(self) -> NMSelection:
        """What is kept, of the mask as it lies now."""
        if self._selection is None or self._selection.mask_GK is not self.mask:
            return self._select()
        return self._selection

    def _select(self) -> NMSelection:
        self._selection = NMSelection(self.pattern, self.mask, self.transposable)
        if self.pattern.vector > 1:
            _ = self._selection.columns_GP  # made now, and not inside a compiled step
        return self._selection

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        how = {"dense_gradient": self.straight_through, "tokens_last": self.tokens_last}
        return nm_linear(x, self.weight, self.selection, self.bias, **how)

    def extra_repr(self) -> str:
        """What nn.Linear says, and the pattern."""
        return f"{super().extra_repr()}, pattern={self.pattern}"


def _check_loaded(layer: nn.Module, incompatible: Any) -> None:
    """A loaded mask must follow the pattern; lists made of the former mask are forgotten."""
    assert isinstance(layer, NMLinear)
    if not layer.mask.is_meta:
        NMSelection(layer.pattern, layer.mask).validated()
        layer._select()

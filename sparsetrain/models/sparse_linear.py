"""Linear layers that leave out products with the zeros of their weights.

O outputs, I inputs.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.block_sparse_linear import WeightBlocks, block_sparse_linear
from sparsetrain_kernels.nm_linear import NMPattern, NMSelection, magnitude_mask, nm_linear
from sparsetrain_kernels.nm_linear.implementations import variant_of
from torch import Tensor, nn

from sparsetrain.config.sparsity import BlockShape
from sparsetrain.errors import SparsityError
from sparsetrain.sharding import canonical_modules

KernelPattern = NMPattern | BlockShape
"""Patterns that kernels are written for."""

PRODUCTS = ("output", "input_gradient", "weight_gradient")
"""What a linear layer computes in a training step."""

_BLOCK = re.compile(r"block\[\s*(\d+)\s*,\s*(\d+)\s*\]")


class SparseLinear(nn.Linear):
    """Takes the place of nn.Linear and leaves out products with zeros while a Sparsifier keeps them where they are.

    Same parameters under the same names, same results. Each of the three products runs what the dispatcher of the
    kernel package finds fastest for it, and the dense product is always one of the candidates.

    The layer holds no mask: it reads from its weight where the zeros are, in the first forward pass after they moved.
    So it may be replicated, sharded and checkpointed like any other. A unit of the pattern that lives but holds nothing
    but exact zeros counts as dead until masks move again; a weight of zeros only is used whole.

    Args:
        linear: Whose parameters to take; it must not be used any further.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._pattern: KernelPattern | None = None
        self._kept: WeightBlocks | NMSelection | None = None
        self.train(linear.training)
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @property
    def pattern(self) -> KernelPattern | None:
        """What the zeros follow; None: anything, and the layer is dense."""
        return self._pattern

    def zeros_follow(self, pattern: str | None) -> None:
        """From now on the weight is zero outside masks of a pattern, and its gradient is not needed there.

        A Sparsifier that owns the weight says so when it is attached, and the contrary when it is detached.

        Args:
            pattern: As sparsity rules name it; None or one that no kernel is written for: the layer is dense.

        Raises:
            SparsityError: The pattern does not divide the weight.
        """
        found = None if pattern is None else kernel_pattern(pattern)
        if found is not None:
            self._check_divides(found)
        self._pattern, self._kept = found, None

    def masks_changed(self) -> None:
        """Look again in the next forward pass where the zeros are. A Sparsifier says so when it has moved them."""
        self._kept = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in autocast's dtype where that is on."""
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, with a bias or without."""
        if self._pattern is None:
            return F.linear(x, self.weight, bias)
        if self._kept is None:
            self._kept = self._find_zeros(self._pattern)
        if isinstance(self._kept, WeightBlocks):
            return block_sparse_linear(x, self.weight, self._kept, bias, zeroed=True)
        if isinstance(self._kept, NMSelection):
            return nm_linear(x, self.weight, self._kept, bias, zeroed=True)
        return F.linear(x, self.weight, bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _find_zeros(self, pattern: KernelPattern) -> WeightBlocks | NMSelection | None:
        """What is kept; None where the weight holds nothing but zeros, and so does not tell."""
        weight_OI = self.weight.detach()
        if not bool(weight_OI.any()):
            return None
        if isinstance(pattern, BlockShape):
            return WeightBlocks.from_weight(weight_OI, (pattern.rows, pattern.cols))
        alive_GI = (weight_OI != 0).unflatten(0, (-1, pattern.vector)).any(1)  # type: ignore[no-untyped-call]
        # A group that holds fewer than n non-zeros is filled up from its beginning.
        selection = NMSelection(pattern, magnitude_mask(alive_GI.float(), NMPattern(pattern.n, pattern.m)))
        if pattern.vector > 1:
            _ = selection.columns_GP  # made now, and not inside a compiled step
        return selection

    def _check_divides(self, pattern: KernelPattern) -> None:
        rows, columns = (pattern.vector, pattern.m) if isinstance(pattern, NMPattern) else (pattern.rows, pattern.cols)
        if self.out_features % rows or self.in_features % columns:
            raise SparsityError(
                f"{pattern_text(pattern)} does not divide a weight of shape [{self.out_features}, {self.in_features}]: "
                f"choose sizes that are multiples of {rows} outputs and {columns} inputs, or another pattern"
            )

    def extra_repr(self) -> str:
        """What nn.Linear says, and the pattern."""
        return super().extra_repr() + ("" if self._pattern is None else f", pattern={pattern_text(self._pattern)}")


def use_sparse_linears(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put a SparseLinear in the place of linear layers; one that no Sparsifier owns computes what it did.

    Call it before the model is replicated, sharded, compiled or given to an optimizer. Parameters stay the same
    objects. Layers of classes derived from nn.Linear stay as they are.

    Args:
        model: Changed in place.
        names: Of weights, such as layers.0.ffn.up.weight; default those of every nn.Linear.

    Raises:
        SparsityError: A name is not the weight of an nn.Linear of the model.
    """
    places = {
        f"{path}.{child}.weight" if path else f"{child}.weight": (parent, child, linear)
        for path, parent in canonical_modules(model)
        for child, linear in parent.named_children()
        if type(linear) is nn.Linear
    }
    wanted = list(places) if names is None else list(names)
    for name in wanted:
        if name not in places:
            raise SparsityError(
                f"{name}: is not the weight of an nn.Linear of this model, and only those leave out zeros; remove the "
                "name, and the weight runs masked dense"
            )
    replaced: dict[nn.Linear, SparseLinear] = {}  # one that several modules share stays shared
    for parent, child, linear in (places[name] for name in wanted):
        setattr(parent, child, replaced.setdefault(linear, SparseLinear(linear)))


def kernel_pattern(pattern: str) -> KernelPattern | None:
    """The pattern that a rule names, if kernels are written for it: block[rows,cols], n:m or vector n:m."""
    if found := _BLOCK.fullmatch(pattern):
        return BlockShape(int(found[1]), int(found[2]))
    return None if pattern == "unstructured" else NMPattern.parse(pattern)


def choices(
    pattern: KernelPattern,
    shape: tuple[int, int],
    density: float,
    num_tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    transposable: bool = False,
) -> list[dispatch.Choice]:
    """What the dispatcher has the output, the input's gradient and the weight's gradient of a layer computed by.

    Args:
        pattern: Of its zeros.
        shape: Of its weight, outputs and inputs.
        density: Share of the units that live.
        num_tokens: Of a forward pass.
        dtype: Of the computation.
        device: cpu or cuda.
        transposable: Whether masks are 2:4 along outputs too.
    """
    if isinstance(pattern, BlockShape):
        kind, variant = "block_sparse_linear", f"{pattern.rows}x{pattern.cols}"
    else:
        kind, variant = "nm_linear", variant_of(pattern, compressed=False, transposable=transposable)
    return [
        dispatch.OPERATIONS[f"{kind}.{product}"].choose(device, dtype, variant, (num_tokens, *shape), density)
        for product in PRODUCTS
    ]


def pattern_text(pattern: KernelPattern) -> str:
    """As rules name it."""
    return str(pattern) if isinstance(pattern, NMPattern) else f"block[{pattern.rows},{pattern.cols}]"


def _forget(module: nn.Module, incompatible: Any) -> None:
    """Loaded weights may have their zeros elsewhere."""
    assert isinstance(module, SparseLinear)
    module.masks_changed()

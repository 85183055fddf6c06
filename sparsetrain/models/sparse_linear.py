"""Linear layers that leave out products with the zeros of their weights.

O outputs, I inputs.
"""

import re
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.block_sparse_linear import WeightBlocks, block_sparse_linear
from sparsetrain_kernels.block_sparse_linear.implementations import variant_of as block_variant
from sparsetrain_kernels.nm_linear import NMPattern, NMSelection, magnitude_mask, nm_linear
from sparsetrain_kernels.nm_linear.implementations import variant_of
from sparsetrain_kernels.precision import compute_dtype
from torch import Tensor, nn

from sparsetrain.config.sparsity import BlockShape
from sparsetrain.errors import SparsityError
from sparsetrain.moe.feed_forward import FeedForward
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
        self._before: _Between | None = None
        self._after: _Between | None = None
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
        self._pattern = found
        self.masks_changed()

    @property
    def is_beside_tokens_last(self) -> bool:
        """Whether what it reads or what it writes is stored tokens last now: see `only_elementwise_between`."""
        return any(between is not None and between.tokens_last for between in (self._before, self._after))

    def masks_changed(self) -> None:
        """Look again in the next forward pass where the zeros are. A Sparsifier says so when it has moved them."""
        self._kept = None
        for between in (self._before, self._after):
            if between is not None:
                between.forget()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in autocast's dtype where that is on."""
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, with a bias or without."""
        if self._pattern is None:
            return F.linear(x, self.weight, bias)
        if self._kept is None:
            self._kept = self._find_zeros(self._pattern)
            self._decide(x)
        elif self._after is not None and not torch.compiler.is_compiling():
            self._after.reconsider(x)
        if self._kept is None:
            return F.linear(x, self.weight, bias)
        tokens_last = self._after is not None and self._after.tokens_last
        if isinstance(self._kept, WeightBlocks):
            return block_sparse_linear(x, self.weight, self._kept, bias, zeroed=True, tokens_last=tokens_last)
        return nm_linear(x, self.weight, self._kept, bias, zeroed=True, tokens_last=tokens_last)

    @property
    def known_density(self) -> float | None:
        """Share of the units of its pattern that live, of masks that the layer has computed with; None: none yet."""
        if isinstance(self._kept, WeightBlocks):
            return self._kept.density
        return None if self._kept is None else self._kept.pattern.density

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decide(self, x: Tensor) -> None:
        for between in (self._before, self._after):
            if between is not None:
                between.decide(x)

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
    for _, module in canonical_modules(model):
        if isinstance(module, FeedForward):
            only_elementwise_between([module.up, *([] if module.gate is None else [module.gate])], module.down)


def only_elementwise_between(firsts: Sequence[nn.Module], second: nn.Module) -> None:
    """Say that nothing but elementwise operations come between some layers and another one, such as in an MLP.

    If all of them come to hold blocks or vectors n:m, activations between them are stored tokens last on a CPU where
    that takes less time by the dispatcher's table: kernels then copy features whole. Results are the same in any case.
    `use_sparse_linears` says so of the feed-forward layers of this package's models; others may call it.

    Args:
        firsts: Whose results are combined.
        second: Which reads what comes of it. Where not all of them are SparseLinear, nothing happens.
    """
    first_layers = [layer for layer in firsts if isinstance(layer, SparseLinear)]
    if len(first_layers) == len(firsts) and isinstance(second, SparseLinear):
        second._before = _Between([*first_layers, second])
        for layer in first_layers:
            layer._after = second._before


class _Between:
    """How activations between layers are stored: decided for all of them, because to mix both orders costs most.

    A layer has it decided when it has found where its zeros are; until all have, activations are stored tokens first.
    """

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        self._layers = layers
        self._num_tokens = 0
        self.tokens_last = False

    def forget(self) -> None:
        """A layer's masks have moved."""
        self.tokens_last = False

    def reconsider(self, x: Tensor) -> None:
        """Decide again if x [..., I] has more than twice or less than half of the tokens that were decided for."""
        num_tokens = x.numel() // x.shape[-1]
        if not self._num_tokens <= 2 * num_tokens <= 4 * self._num_tokens:
            self.decide(x)

    def decide(self, x: Tensor) -> None:
        """By whether all products of all layers are known to take less time so."""
        self._num_tokens = x.numel() // x.shape[-1]
        case = self._num_tokens, compute_dtype(x)
        self.tokens_last = x.is_cpu and self._seconds(*case, tokens_last=True) < self._seconds(*case, tokens_last=False)

    def _seconds(self, num_tokens: int, dtype: torch.dtype, *, tokens_last: bool) -> float:
        """Of all products on a CPU; infinite where a layer has no units, has not found them yet, or has no times."""
        total = 0.0
        for layer in self._layers:
            pattern, density = layer.pattern, layer.known_density
            if density is None or pattern is None or (isinstance(pattern, NMPattern) and pattern.vector == 1):
                return inf
            case = pattern, (layer.out_features, layer.in_features), density, num_tokens, dtype, "cpu"
            for choice in choices(*case, tokens_last=tokens_last):
                total += inf if choice.seconds is None else choice.seconds
        return total


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
    tokens_last: bool = False,
) -> list[dispatch.Choice]:
    """What the dispatcher would have the output, the input's and the weight's gradient of a layer computed by.

    Args:
        pattern: Of its zeros.
        shape: Of its weight, outputs and inputs.
        density: Share of the units that live.
        num_tokens: Of a forward pass.
        dtype: Of the computation.
        device: cpu or cuda.
        transposable: Whether masks are 2:4 along outputs too.
        tokens_last: Whether inputs or outputs are stored tokens last.
    """
    if isinstance(pattern, BlockShape):
        kind, variant = "block_sparse_linear", block_variant((pattern.rows, pattern.cols), tokens_last)
    else:
        kind = "nm_linear"
        variant = variant_of(pattern, compressed=False, transposable=transposable, tokens_last=tokens_last)
    return [
        dispatch.OPERATIONS[f"{kind}.{product}"].would_choose(device, dtype, variant, (num_tokens, *shape), density)
        for product in PRODUCTS
    ]


def pattern_text(pattern: KernelPattern) -> str:
    """As rules name it."""
    return str(pattern) if isinstance(pattern, NMPattern) else f"block[{pattern.rows},{pattern.cols}]"


def _forget(module: nn.Module, incompatible: Any) -> None:
    """Loaded weights may have their zeros elsewhere."""
    assert isinstance(module, SparseLinear)
    module.masks_changed()

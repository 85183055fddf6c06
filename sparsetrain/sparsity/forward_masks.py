"""What recipes change in the forward pass: linear layers that see their weight through a mask.

Masks live with the Sparsifier, which chooses them by the optimizer's weights; so they do not depend on mixed precision
or sharding, and a checkpoint holds them. Layers keep their class, their parameters and their state dict. Products are
masked dense, or those of `nm_linear` where the dispatcher of the kernel package knows them to be faster.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sparsetrain_kernels.dispatch import DENSE, OPERATIONS
from sparsetrain_kernels.nm_linear import NMSelection, nm_linear
from sparsetrain_kernels.nm_linear.implementations import variant_of
from sparsetrain_kernels.precision import compute_dtype
from torch import Tensor, nn

from sparsetrain.errors import ConfigError
from sparsetrain.sharding import PartOfModel, canonical_modules
from sparsetrain.sparsity.followers import FollowsZeros
from sparsetrain.sparsity.gathering import whole_of
from sparsetrain.sparsity.methods.recipe import StraightThrough
from sparsetrain.sparsity.weights import SparseWeight


class _SeenWeight(torch.autograd.Function):
    """W ⊙ factor; the gradient of W is that of the product, times a factor of its own where there is one."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, factor_OI: Tensor, flows_freely: bool) -> Tensor:
        ctx.save_for_backward(*(() if flows_freely else (factor_OI,)))
        return weight_OI * factor_OI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_OI,) = gradients
        return (gradient_OI * ctx.saved_tensors[0] if ctx.saved_tensors else gradient_OI), None, None


class _TwoWeights(torch.autograd.Function):
    """y = x Wᵀ with one weight, ∂L/∂x = ∂L/∂y W′ with another."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, forward_OI: Tensor, backward_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, backward_OI)
        return x_TI @ forward_OI.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_TO,) = gradients
        x_TI, backward_OI = ctx.saved_tensors
        return gradient_TO @ backward_OI, gradient_TO.flatten(0, -2).T @ x_TI.flatten(0, -2), None


@dataclass(eq=False)
class SeenThroughMask:
    """The forward pass of one linear layer."""

    layer: nn.Linear | None
    """None: another pipeline stage has it."""
    weight: SparseWeight
    method: StraightThrough
    part: PartOfModel | None = None
    """Whose layers multiply with a part of the weight; None: they multiply with the whole, gathered where it is cut."""
    whole_OI: Tensor | None = None
    """What the whole weight is multiplied with."""
    factor_OI: Tensor | None = None
    """What the layer's weight is multiplied with: bool, or of the weight's dtype while unseen weights fade out."""
    backward_OI: Tensor | None = None
    """The mask of the input gradient, bool, where it is another."""
    selection: NMSelection | None = None
    """The mask as kernels read it; None while unseen weights take part, or where there are two masks."""

    def __call__(self, x: Tensor, *biases: Tensor | None) -> Tensor:
        """y = x (W ⊙ factor)ᵀ + b; b is that of the layer if none is given."""
        layer, factor_OI = self.layer, self.factor_OI
        assert layer is not None
        assert factor_OI is not None, "the Sparsifier brings masks before the first step"
        (bias,) = biases or (layer.bias,)
        if self.selection is not None and _kernels_are_faster(x, self.selection):
            every = self.method.gradient_flows_freely
            return nm_linear(x, layer.weight, self.selection, bias, dense_gradient=every)
        seen_OI = _SeenWeight.apply(layer.weight, factor_OI, self.method.gradient_flows_freely)  # type: ignore[no-untyped-call]
        if self.backward_OI is None:
            return F.linear(x, seen_OI, bias)
        other_OI = layer.weight.detach() * self.backward_OI
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, seen_OI, other_OI = x.to(dtype), seen_OI.to(dtype), other_OI.to(dtype)
        y: Tensor = _TwoWeights.apply(x, seen_OI, other_OI)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.to(y.dtype)

    def refresh(self, step: int) -> None:
        """Take over the mask as it is; collective where the weight is sharded."""
        shard = self.weight.shard
        mask_OI = whole_of(shard, self.weight.bits).bool()
        self.weight.unseen_factor = unseen = self.method.unseen_factor(step)
        master_OI = shard.local_master()
        factor_OI = torch.where(mask_OI, 1.0, torch.tensor(unseen, dtype=master_OI.dtype)) if unseen else mask_OI
        backward_OI = self.method.input_gradient_mask(whole_of(shard, master_OI))
        self.whole_OI, self.factor_OI = factor_OI, self._of_layer(factor_OI)
        self.backward_OI = None if backward_OI is None else self._of_layer(backward_OI)
        self.selection = None if unseen or backward_OI is not None else self._selection(mask_OI, step)

    def _of_layer(self, whole_OI: Tensor) -> Tensor:
        return whole_OI if self.part is None else self.part.multiplied_part(self.weight.shard.name, whole_OI)

    def _selection(self, mask_OI: Tensor, step: int) -> NMSelection | None:
        """The mask as kernels read it; None where all of the weight is seen, or a layer multiplies with a part."""
        if self.weight.is_dense or self.part is not None:
            return None
        pattern = self.method.pattern(step)
        mask_GI = mask_OI[:: pattern.vector].contiguous()
        return NMSelection(pattern, mask_GI, self.method.masks_are_transposable)

    @torch.no_grad()
    def fold(self) -> None:
        """Put what the forward pass sees into the weight, in the optimizer's copy too; collective."""
        assert self.whole_OI is not None
        local = self.weight.shard.cut(self.whole_OI)
        kept, master = self.weight.shard.local_weight(), self.weight.shard.local_master()
        for part in [kept] if kept.data_ptr() == master.data_ptr() else [kept, master]:
            part.mul_(local.to(part.dtype).view(part.shape))


def _kernels_are_faster(x: Tensor, selection: NMSelection) -> bool:
    """Whether the dispatcher has a product with the weight leave out zeros; compiled steps stay masked dense."""
    if torch.compiler.is_compiling():
        return False
    variant = variant_of(selection.pattern, compressed=False, transposable=selection.is_transposable)
    problem = variant, (x.numel() // x.shape[-1], *selection.shape), selection.pattern.density
    products = (OPERATIONS[f"nm_linear.{product}"] for product in ("output", "input_gradient"))
    return any(p.choose(x.device.type, compute_dtype(x), *problem).implementation != DENSE for p in products)


class ForwardMasks:
    """The layers of a model that see their weights through masks.

    Args:
        model: Plain, wrapped or sharded.
        weights: What recipes own, with their methods.

    Raises:
        ConfigError: A weight is not that of an nn.Linear of its own.
    """

    def __init__(self, model: nn.Module, weights: Iterable[tuple[StraightThrough, SparseWeight]]) -> None:
        part = model if isinstance(model, PartOfModel) else None
        users = _users(model)
        all_users = users if part is None else _users(part.whole) | users
        self._layers = []
        for method, weight in weights:
            layer = _linear(all_users, method, weight)
            self._layers.append(SeenThroughMask(layer if weight.shard.name in users else None, weight, method, part))
        for seen in self._layers:
            if seen.layer is not None:
                seen.layer.__dict__[_product(seen.layer)] = seen  # before the class's method, after any wrapper's hooks

    def __bool__(self) -> bool:
        return bool(self._layers)

    def refresh(self, step: int, due: Callable[[StraightThrough], bool] = lambda method: True) -> None:
        """Take over masks and factors that hold once `step` steps are done; collective where weights are sharded."""
        for seen in self._layers:
            if due(seen.method) or seen.method.unseen_factor(step) != seen.weight.unseen_factor:
                seen.refresh(step)

    def follow(self, weights: Iterable[tuple[StraightThrough, SparseWeight]], step: int) -> None:
        """Go on with other methods of the same weights, in the same order, and refresh; collective."""
        for seen, (method, _) in zip(self._layers, weights, strict=True):
            seen.method = method
        self.refresh(step)

    def fold(self) -> None:
        """Make every weight what the forward pass sees of it."""
        for seen in self._layers:
            seen.fold()

    def remove(self) -> None:
        """Let the layers multiply with their whole weights again."""
        for seen in self._layers:
            if seen.layer is not None and seen.layer.__dict__.get(_product(seen.layer)) is seen:
                del seen.layer.__dict__[_product(seen.layer)]
        self._layers = []


def _product(layer: nn.Linear) -> str:
    """The method that multiplies with the weight: a layer may do more than that, such as add up over ranks."""
    return "multiply" if hasattr(layer, "multiply") else "forward"


def _users(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a weight of their own, by its name."""
    users: dict[str, nn.Module] = {}
    for path, module in canonical_modules(model):
        if "weight" in dict(module.named_parameters(recurse=False)):
            users[f"{path}.weight" if path else "weight"] = module
    return users


def _linear(users: dict[str, nn.Module], method: StraightThrough, weight: SparseWeight) -> nn.Linear:
    name = weight.shard.name
    layer = users.get(name)
    if isinstance(layer, nn.Linear) and (type(layer).forward is nn.Linear.forward or isinstance(layer, FollowsZeros)):
        return layer
    kind = "part of a stack of experts" if layer is None else f"the weight of a {type(layer).__name__}"
    raise ConfigError(
        f"sparsity.method={method.rule.method}: {name} is {kind}, and the method needs an nn.Linear; "
        "give it a rule with method=static or prune before this one, or leave it out"
    )

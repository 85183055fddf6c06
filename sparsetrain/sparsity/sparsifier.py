"""Sparsifier: makes rules hold on any module trained by any optimizer, sharded or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.errors import CheckpointError, ShardingError
from sparsetrain.sharding import Move, WeightShard, on_move, weight_shards
from sparsetrain.sparsity.followers import Followers
from sparsetrain.sparsity.forward_masks import ForwardMasks
from sparsetrain.sparsity.matching import describe_parameters, match_rules
from sparsetrain.sparsity.methods import METHODS, Method, StraightThrough
from sparsetrain.sparsity.schedules import Timetable
from sparsetrain.sparsity.weights import SparseWeight, update_masks
from sparsetrain.sparsity.windows import StepCosts, need_no_steps, plan_timetables
from sparsetrain.sparsity.zeroing import as_bool

_KEEPS_ZEROS = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""Optimizers that work entry by entry and map state 0 under gradient 0 to state 0: theirs is zeroed only when masks
change. That of any other is zeroed after each step."""


@dataclass(frozen=True)
class LayerSparsity:
    """How sparse one weight is."""

    name: str
    rule: int
    """Index of the rule that owns it."""
    numel: int
    nonzeros: int
    flip_rate: float
    """Share of the mask's entries that its latest update changed."""

    @property
    def density(self) -> float:
        """Share of weights that live."""
        return self.nonzeros / self.numel


class Sparsifier:
    """Keeps the weights that rules own exactly as sparse as the rules say, from one optimizer step to the next.

    After every step of the optimizer zeroed weights are exactly 0, in the optimizer's own copy too, and so are their
    moments; their gradient is 0 when the optimizer reads it. Masks are functions of the values, not of the layout:
    plain, `fully_shard`-ed and flat-partitioned weights with equal values get bitwise equal masks. Weights that move
    between ranks take theirs along. The n:m recipes are different: their weights stay dense and learn, and it is the
    forward pass of their linear layers that sees `W ⊙ M`, from `attach` to `detach`; `fold` makes that the weight.

        sparsifier = Sparsifier([SparsityRule(params="*.ffn.*", method="static", sparsity=0.75)])
        sparsifier.attach(model, optimizer)

    Args:
        rules: The first that matches a weight owns it. None at all is a dense phase.
        total_steps: Optimizer steps of the phase; needed where a rule has a schedule with a window.
        seed: Of random masks.
        costs: Of a training step, by which windows are placed; default: owned weights in proportion to their size.
        hold: Keep the masks that `attach` or `load_masks` is given for the whole phase, whatever the rules' schedules.
    """

    def __init__(
        self,
        rules: Sequence[SparsityRule],
        *,
        total_steps: int | None = None,
        seed: int = 0,
        costs: StepCosts | None = None,
        hold: bool = False,
    ) -> None:
        if total_steps is None and not hold:
            need_no_steps(rules)
        self.rules = tuple(rules)
        self.step = 0
        """Optimizer steps done in this phase."""
        self.masks_changed = False
        """Whether the latest of them was followed by new masks."""
        self._total_steps = total_steps
        self._seed = seed
        self._costs = costs
        self._hold = hold
        self._weights: list[list[SparseWeight]] = [[] for _ in rules]
        self._methods: list[Method] = []
        self._forward = ForwardMasks(nn.Module(), ())
        self._followers = Followers(nn.Module(), {})
        self._handles: list[RemovableHandle] = []
        self._zeroes_moments_each_step = True
        self._gradients_are_masked = False

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        shards: Sequence[WeightShard] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Begin a phase: match the rules, make the first masks, zero what they zero, follow the optimizer's steps.

        Collective over the weights' groups. Attaching again, for example to a new optimizer, begins with the masks
        that are there.

        Args:
            model: Whose parameters the globs name; wrapped or sharded already.
            optimizer: Whose steps to follow. None: the caller calls `mask_gradients` before and `after_step` after
                each step of whatever updates the weights.
            shards: Where the weights are, when parameters and optimizer cannot tell.
            masks: What a phase before left, local bool masks by name; names that no rule owns are passed over.
                Pruning goes on from them.

        Raises:
            ConfigError: The rules do not fit the model.
            ShardingError: `shards` leaves out a weight that a rule owns.
            TrainingError: Weights are not finite.
        """
        self.detach()
        masks = self.masks() if masks is None else masks
        owned = match_rules(self.rules, describe_parameters(model))
        by_name = {shard.name: shard for shard in (weight_shards(model, optimizer) if shards is None else shards)}
        if missing := [parameter.name for mine in owned for parameter in mine if parameter.name not in by_name]:
            raise ShardingError(
                f"no shard describes {missing[0]}, which a sparsity rule owns; pass shards of all weights"
            )
        self._weights = [[SparseWeight.dense(by_name[parameter.name]) for parameter in mine] for mine in owned]
        inherited = [weight for weight in self._all() if weight.shard.name in masks]
        update_masks(inherited, [masks[weight.shard.name] for weight in inherited], count_flips=False)
        self.step = 0
        if self._hold:
            self._set_timetables([Timetable((), ())] * len(self.rules))
        else:
            self._set_timetables(
                plan_timetables(
                    self.rules,
                    owned,
                    total_steps=self._total_steps,
                    costs=self._costs,
                    initial_densities=self.densities(),
                )
            )
            for method, weights in zip(self._methods, self._weights, strict=True):
                update_masks(weights, method.first_masks(weights), count_flips=False)
        self._followers = Followers(model, self._patterns_of_zeros())
        self._zero_everything()
        self._forward = ForwardMasks(model, self._recipes())
        self._forward.refresh(0)
        self._handles = on_move(model, self._follow)
        if optimizer is not None:
            self._zeroes_moments_each_step = type(optimizer) not in _KEEPS_ZEROS
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]
        return self

    def detach(self) -> None:
        """Stop following optimizer and moves. Weights stay as they are: nothing keeps the zeroed ones at 0 any more.

        The forward pass sees all of the weights that recipes own again: see `fold`.
        """
        self._forward.remove()
        self._followers.release()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def fold(self) -> None:
        """End the phase: weights of recipes become what the forward pass sees of them, and `detach`; collective."""
        self._forward.fold()
        self.detach()

    def mask_gradients(self) -> None:
        """Zero the gradient of zeroed weights, so that norms and clipping see what the optimizer will.

        Recipes that add a decay to the gradient add it here, once a step.

        Call it after the backward pass, once gradients are summed over ranks; the optimizer's step then does not do it
        again. After a step that is not taken, call `after_step` if it counts, or this again for the next one.
        """
        for method, weights in self._due(self.step + 1):
            method.see_gradients(weights)
        for weight in self._zeroed_in_parameter():
            weight.zero_gradient()
        if self._forward:
            for method, weights in zip(self._methods, self._weights, strict=True):
                if isinstance(method, StraightThrough):
                    method.add_to_gradients(weights)
        self._gradients_are_masked = True

    def after_step(self) -> None:
        """Count an optimizer step, change the masks that are due, and zero. Collective when masks change.

        The optimizer calls it; an engine whose optimizer does not must call it before weights are gathered again.

        Raises:
            TrainingError: Masks are due and weights are not finite.
        """
        self.step += 1
        self._gradients_are_masked = False
        for weight in self._zeroed_in_parameter():
            weight.zero_weight()  # before masks are chosen: an optimizer may have left 0/0 there
            if self._zeroes_moments_each_step:
                weight.zero_moments()
        due = self._due(self.step)
        self.masks_changed = bool(due)
        for method, weights in due:
            update_masks(weights, method.next_masks(weights, self.step))
        if due:
            self._zero_everything()
        renewed = {id(method) for method, _ in due}
        self._forward.refresh(self.step, lambda method: id(method) in renewed)

    @property
    def numel(self) -> int:
        """Weights that rules own, over all ranks."""
        return sum(weight.shard.global_numel for weight in self._all())

    @property
    def nonzeros(self) -> int:
        """Of the weights that rules own, those that live."""
        return sum(weight.multiplied for weight in self._all())

    @property
    def density(self) -> float:
        """Share of the owned weights that live; 1 when rules own nothing."""
        return self.nonzeros / self.numel if self.numel else 1.0

    @property
    def flip_rate(self) -> float:
        """Share of all mask entries that the latest mask updates changed."""
        return sum(weight.flips for weight in self._all()) / self.numel if self.numel else 0.0

    @property
    def sad(self) -> int:
        """Sparse architecture divergence (arXiv 2102.04010): mask bits that the latest mask updates changed."""
        return sum(weight.flips for weight in self._all())

    def densities(self) -> dict[str, float]:
        """Density of each owned weight by parameter name, as the forward pass sees it."""
        return {weight.shard.name: weight.multiplied / weight.shard.global_numel for weight in self._all()}

    def weight_gradient_densities(self) -> dict[str, float]:
        """By parameter name, the share of each owned weight whose gradient is computed: recipes let it flow."""
        densities = self.densities()
        free = {weight.shard.name: method for method, weight in self._recipes()}
        return {
            name: free[name].product_densities(density).weight_gradient if name in free else density
            for name, density in densities.items()
        }

    def report(self) -> list[LayerSparsity]:
        """Every owned weight, rule by rule and by name."""
        return [
            LayerSparsity(
                weight.shard.name,
                rule,
                weight.shard.global_numel,
                weight.multiplied,
                weight.flips / weight.shard.global_numel,
            )
            for rule, weights in enumerate(self._weights)
            for weight in weights
        ]

    def masks(self) -> dict[str, Tensor]:
        """Copies of the masks, bool of the local shapes, by parameter name; True lives."""
        return {weight.shard.name: as_bool(weight.bits) for weight in self._all()}

    def load_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put back masks that `masks` returned at this layout, and zero what they zero; collective.

        Raises:
            CheckpointError: A mask is missing, or is not of the shape of its weight's local part.
        """
        weights = self._all()
        for weight in weights:
            found = masks.get(weight.shard.name)
            if found is None or found.shape != weight.bits.shape:
                held = "missing" if found is None else f"{list(found.shape)}"
                raise CheckpointError(
                    f"the mask of {weight.shard.name} should have shape {list(weight.bits.shape)}, not {held}: "
                    "it was saved by a run with other sparsity rules"
                )
        update_masks(weights, [masks[weight.shard.name] for weight in weights], count_flips=False)
        self._zero_everything()
        self._forward.refresh(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Where the phase stands, in plain values; masks are kept apart, see `masks`."""
        return {
            "step": self.step,
            "timetables": [list(zip(m.timetable.steps, m.timetable.sparsities, strict=True)) for m in self._methods],
            "flips": {weight.shard.name: weight.flips for weight in self._all()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, by the timetables of then; call it after `attach` and `load_masks`.

        Raises:
            CheckpointError: It is the state of other rules.
        """
        if len(state["timetables"]) != len(self.rules) or state["flips"].keys() != self.densities().keys():
            raise CheckpointError(
                f"the checkpoint was saved with {len(state['timetables'])} sparsity rules over {len(state['flips'])} "
                f"weights, and this run has {len(self.rules)} over {len(self.densities())}"
            )
        self.step = state["step"]
        saved = state["timetables"]
        self._set_timetables([Timetable(tuple(int(s) for s, _ in t), tuple(level for _, level in t)) for t in saved])
        for weight in self._all():
            weight.flips = state["flips"][weight.shard.name]
        self._forward.follow(self._recipes(), self.step)

    def _follow(self, move: Move) -> None:
        """Take the masks of weights that have changed ranks along."""
        shards = {shard.name: shard for shard in move.shards}
        moved = {weight.shard.name: weight for weight in self._all() if weight.shard.name in shards}
        carried = move.carry({name: weight.bits for name, weight in moved.items()})
        for name, weight in moved.items():
            weight.shard, weight.bits = shards[name], carried[name]

    def _set_timetables(self, tables: Sequence[Timetable]) -> None:
        self._methods = [
            METHODS[rule.method](rule, timetable=table, seed=self._seed)
            for rule, table in zip(self.rules, tables, strict=True)
        ]

    def _due(self, step: int) -> list[tuple[Method, list[SparseWeight]]]:
        """Whose masks change once `step` steps are done."""
        pairs = zip(self._methods, self._weights, strict=True)
        return [] if self._hold else [(method, weights) for method, weights in pairs if method.is_due(step)]

    def _all(self) -> list[SparseWeight]:
        return [weight for weights in self._weights for weight in weights]

    def _zeroed_in_parameter(self) -> list[SparseWeight]:
        return [
            weight
            for method, weights in zip(self._methods, self._weights, strict=True)
            if method.zeros_in_parameter or self._hold
            for weight in weights
        ]

    def _patterns_of_zeros(self) -> dict[str, str]:
        """Pattern by name of each weight that is zero where its mask is; held masks may have come from other rules."""
        return {
            weight.shard.name: rule.pattern
            for rule, method, weights in zip(self.rules, self._methods, self._weights, strict=True)
            if method.zeros_in_parameter
            for weight in weights
        }

    def _recipes(self) -> list[tuple[StraightThrough, SparseWeight]]:
        """What the forward pass masks; nothing where masks are only held, for the phase before has folded them."""
        return [
            (method, weight)
            for method, weights in zip(self._methods, self._weights, strict=True)
            if isinstance(method, StraightThrough) and not self._hold
            for weight in weights
        ]

    @torch.no_grad()
    def _zero_everything(self) -> None:
        for weight in self._zeroed_in_parameter():
            weight.zero_weight()
            weight.zero_moments()
            weight.zero_gradient()
        self._followers.masks_changed()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Mask gradients, and those that a closure computes inside the step as soon as they are there."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if not self._gradients_are_masked:
                self.mask_gradients()
            return None

        def masked_closure() -> Any:
            loss = closure()
            self.mask_gradients()
            return loss

        return (args[0], masked_closure, *args[2:]), {key: value for key, value in kwargs.items() if key != "closure"}

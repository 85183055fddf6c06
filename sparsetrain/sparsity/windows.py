"""Windows: schedules speak of fractions of training compute, optimizers of steps.

Pruning makes later steps cheaper, so where a quarter of the compute lies depends on the schedule that is placed there:
a fixed point, solved by iteration. For one geometric rule over all compute from 25 % to 75 % it has a closed form
(arXiv 2501.12486): the run costs ρ = 1/(.25 + .25/(1−S) + .5/g) of the dense one, g = S/−ln(1−S), and the window is
[.25ρ, 1 − .25ρ/(1−S)] in steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config.sparsity import Constant, ErdosRenyiKernel, SparsityRule
from sparsetrain.errors import ConfigError
from sparsetrain.sparsity.distributions import erk_densities
from sparsetrain.sparsity.matching import Parameter, match_rules
from sparsetrain.sparsity.recipe_schedules import recipe_timetable
from sparsetrain.sparsity.schedules import Timetable, anchors, changes, timetable

_ROUNDS = 200
_CLOSE_ENOUGH = 0.01
"""Steps."""


@dataclass(frozen=True)
class StepCosts:
    """What a training step costs, up to a factor common to all of them."""

    tokens_per_step: Sequence[int] | int = 1
    """Tokens of each step of the phase, or of every step."""
    fixed_flops_per_token: float = 0.0
    """What no rule changes: attention scores, head, weights that stay dense."""
    flops_per_token: Mapping[str, float] = field(default_factory=dict)
    """Of each owned weight by parameter name while it is dense; the cost is in proportion to its density."""


@dataclass(frozen=True, eq=False)
class _Owned:
    """The weights of one rule, reduced to what they cost."""

    rule: SparsityRule
    shapes: tuple[tuple[int, ...], ...]
    flops: NDArray[np.float64]
    """Per weight and token, dense."""
    initial: NDArray[np.float64]
    """Density of each weight when the phase begins."""

    def rate(self, sparsities: Sequence[float]) -> NDArray[np.float64]:
        """FLOPs per token at each sparsity. A global threshold is planned as if it fell evenly on all weights."""
        levels = np.array(sparsities)
        if isinstance(self.rule.distribution, ErdosRenyiKernel):
            densities = erk_densities(self.shapes, levels)
        else:
            densities = 1 - levels[:, None]
        return np.minimum(densities, self.initial) @ self.flops


def need_no_steps(rules: Sequence[SparsityRule]) -> None:
    """Refuse rules that are placed on a number of steps which nobody has told.

    Raises:
        ConfigError: There is such a rule.
    """
    for at, rule in enumerate(rules):
        if not isinstance(rule.schedule, Constant) or rule.method in ("mdgf", "sdgf", "transposable"):
            key = f"method={rule.method}" if rule.is_recipe else f"schedule={rule.schedule.kind}"
            raise ConfigError(
                f"sparsity[{at}].{key} is placed on a known number of steps: pass total_steps to Sparsifier"
            )


def plan_timetables(
    rules: Sequence[SparsityRule],
    owned: Sequence[Sequence[Parameter]],
    *,
    total_steps: int | None,
    costs: StepCosts | None = None,
    initial_densities: Mapping[str, float] | None = None,
) -> list[Timetable]:
    """Place every rule's schedule on the steps of a phase.

    Args:
        rules: Of the phase.
        owned: The weights of each rule, from `match_rules`.
        total_steps: Of the phase; may be None when all schedules are constant.
        costs: Of a step; default: each owned weight in proportion to its size, and nothing else.
        initial_densities: Of weights that a phase before left sparse, by name.

    Raises:
        ConfigError: A schedule has a window and `total_steps` is None, or `costs` is for another number of steps.
    """
    fractions = [anchors(rule.schedule) for rule in rules]
    if not any(fractions):
        return [_timetable(rule, (), total_steps) for rule in rules]
    if total_steps is None:
        raise ConfigError("a sparsity rule with a schedule needs the number of training steps: pass total_steps")
    costs = costs or StepCosts(flops_per_token={p.name: 2.0 * p.numel for mine in owned for p in mine})
    tokens = _tokens_before(costs.tokens_per_step, total_steps)
    weights = [
        _Owned(
            rule,
            tuple(parameter.shape for parameter in mine),
            np.array([costs.flops_per_token.get(parameter.name, 0.0) for parameter in mine]),
            np.array([(initial_densities or {}).get(parameter.name, 1.0) for parameter in mine]),
        )
        for rule, mine in zip(rules, owned, strict=True)
    ]
    places = [[fraction * total_steps for fraction in row] for row in fractions]
    share, last = 0.5, math.inf
    for _ in range(_ROUNDS):
        aim = _place(fractions, places, weights, costs.fixed_flops_per_token, tokens)
        moves = [[a - b for a, b in zip(new, old, strict=True)] for new, old in zip(aim, places, strict=True)]
        farthest = max(abs(move) for row in moves for move in row)
        if share * farthest < _CLOSE_ENOUGH:
            break
        # Go part of the way, and less of it whenever that overshoots: at high sparsity the whole way never settles.
        share, last = share * (0.8 if farthest > 0.9 * last else 1.0), farthest
        places = [[at + share * move for at, move in zip(*row, strict=True)] for row in zip(places, moves, strict=True)]
    return [
        _timetable(rule, [math.floor(place + 0.5) for place in row], total_steps)
        for rule, row in zip(rules, places, strict=True)
    ]


def _timetable(rule: SparsityRule, at: Sequence[int], total_steps: int | None) -> Timetable:
    return recipe_timetable(rule, total_steps or 0) if rule.is_recipe else timetable(rule, at)


def planned_densities(
    rules: Sequence[SparsityRule],
    parameters: Sequence[Parameter],
    *,
    total_steps: int,
    costs: StepCosts | None = None,
) -> NDArray[np.float64]:
    """Density of each rule's weights during each step of a phase, without running it: [rule, total_steps].

    Args:
        rules: Of the phase.
        parameters: From `describe_parameters`; the model may be on the meta device.
        total_steps: Of the phase.
        costs: As for `plan_timetables`.

    Raises:
        ConfigError: The rules do not fit the parameters, or `costs` is for another number of steps.
    """
    plan = plan_timetables(rules, match_rules(rules, parameters), total_steps=total_steps, costs=costs)
    return np.stack([table.densities(total_steps) for table in plan]) if plan else np.empty((0, total_steps))


def _tokens_before(tokens_per_step: Sequence[int] | int, total_steps: int) -> NDArray[np.float64]:
    """Tokens seen before each step and at the end: [total_steps + 1]."""
    if isinstance(tokens_per_step, int):
        return np.arange(total_steps + 1, dtype=np.float64) * tokens_per_step
    if len(tokens_per_step) != total_steps:
        raise ConfigError(f"costs.tokens_per_step has {len(tokens_per_step)} entries for {total_steps} steps")
    return np.cumsum([0.0, *tokens_per_step], dtype=np.float64)


def _place(
    fractions: Sequence[Sequence[float]],
    places: Sequence[Sequence[float]],
    weights: Sequence[_Owned],
    fixed: float,
    tokens: NDArray[np.float64],
) -> list[list[float]]:
    """Where the fractions of compute lie in steps, if the schedules stood at `places`."""
    total_steps = len(tokens) - 1
    by_rule = [changes(one.rule, row) for one, row in zip(weights, places, strict=True)]
    times = sorted({0.0, float(total_steps), *(min(step, total_steps) for row in by_rule for step, _ in row)})
    seen = np.interp(times, np.arange(total_steps + 1), tokens)
    rates = np.full(len(times) - 1, fixed)
    for one, row in zip(weights, by_rule, strict=True):
        levels = one.rate([0.0, *(level for _, level in row)])
        rates += levels[np.searchsorted([step for step, _ in row], times[:-1], side="right")]
    if not rates.any():
        rates[:] = 1.0  # nothing that is known costs anything: count tokens
    spent = np.concatenate([[0.0], np.cumsum(rates * np.diff(seen))])
    return [
        list(np.interp(np.interp(np.array(row) * spent[-1], spent, seen), tokens, np.arange(total_steps + 1)))
        for row in fractions
    ]

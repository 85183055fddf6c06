"""When the forward pass of an n:m recipe is how sparse. Its fractions are of the phase's steps."""

import math

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.sparsity.schedules import Timetable


def stages_of(rule: SparsityRule) -> list[int]:
    """The n of each stage: m − 1, m/2, m/4, ... while above the pattern's, and the pattern's."""
    assert rule.groups is not None
    n, m = rule.groups.n, rule.groups.m
    halves = [m >> power for power in range(1, m.bit_length())]
    return [*dict.fromkeys(kept for kept in (m - 1, *halves) if kept > n), n]


def recipe_timetable(rule: SparsityRule, total_steps: int) -> Timetable:
    """When the forward pass of a recipe is how sparse; fractions are of the phase's steps."""
    if rule.method == "mdgf":
        return Timetable((_step(0.75 if rule.decay_end is None else rule.decay_end, total_steps),), (rule.sparsity,))
    if rule.method == "sdgf":
        return _staged(rule, total_steps)
    tail = (1 / 6 if rule.dense_tail is None else rule.dense_tail) if rule.method == "transposable" else 0.0
    if not tail:
        return Timetable((0,), (rule.sparsity,))
    return Timetable((0, _step(1 - tail, total_steps)), (rule.sparsity, 0.0))


def _staged(rule: SparsityRule, total_steps: int) -> Timetable:
    stages = stages_of(rule)
    before = len(stages) - 1
    end = before / len(stages) if rule.decay_end is None else rule.decay_end
    m = rule.groups.m if rule.groups else 1
    by_step = {_step(end * at / max(before, 1), total_steps): 1 - n / m for at, n in enumerate(stages)}
    return Timetable(tuple(by_step), tuple(by_step.values()))


def _step(fraction: float, total_steps: int) -> int:
    return math.floor(fraction * total_steps + 0.5)

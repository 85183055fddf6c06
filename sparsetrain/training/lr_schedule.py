"""The learning rate of every step of a phase."""

import math

from sparsetrain.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Learning rate after `tokens` of a phase's `total_tokens`; a linear warmup, then the schedule's curve.

    The step that trains on tokens up to `tokens` uses it: so no step of a warmup is wasted on a rate of 0, and the last
    step of a phase uses the final rate.
    """
    schedule = config.schedule
    progress = tokens / total_tokens
    if progress < schedule.warmup:
        return config.lr * progress / schedule.warmup
    match schedule.kind:
        case "constant":
            share = 1.0
        case "wsd":
            since = progress - (1.0 - schedule.decay)
            share = 1.0 - (1.0 - schedule.final) * since / schedule.decay if since > 0 else 1.0
        case "linear" | "cosine":
            after = (progress - schedule.warmup) / (1.0 - schedule.warmup) if schedule.warmup < 1 else 1.0
            curve = 1.0 - after if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * after))
            share = schedule.final + (1.0 - schedule.final) * curve
    return config.lr * share

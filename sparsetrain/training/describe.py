"""A phase in one line, for people."""

from sparsetrain.config import DataConfig, RunConfig, SparsityRule


def describe_phase(config: RunConfig, index: int) -> str:
    """Say what a phase trains on, which weights are zero in it, and what became of optimizer and learning rate."""
    phase = config.phases[index]
    optimizer = phase.optimizer
    parts = [_data(phase.data), _sparsity(phase.sparsity)]
    if index > 0:
        state = {"reset": "Adam's moments start at zero", "keep": "Adam's moments are kept"}[phase.optimizer_state]
        parts.append(f"{state}, learning rate starts anew ({optimizer.schedule.kind}, {optimizer.lr:g})")
    return "; ".join(parts)


def _data(data: DataConfig) -> str:
    kinds = []
    for source in data.source:
        part = getattr(source, "part", None)
        kinds.append(f"{source.kind} ({part})" if part else source.kind)
    return " + ".join(kinds)


def _sparsity(rules: str | tuple[SparsityRule, ...]) -> str:
    if isinstance(rules, str):
        return "masks as they are"
    if not rules:
        return "dense: weights that were zero start at 0 and learn"
    rest = "the rest dense"
    named = [f"{rule.method} to {rule.sparsity:.0%} ({rule.pattern}, {rule.schedule.kind})" for rule in rules]
    return ", ".join([*named, rest])

"""A YAML file and overrides -> a RunConfig, or one error that lists everything that is wrong."""

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsetrain.config.checks import conflicts, world_conflicts
from sparsetrain.config.conflict import Conflict
from sparsetrain.config.explain import problems_of, value_at
from sparsetrain.config.navigate import nearest, section_at
from sparsetrain.config.origin import FilePosition, KeyPath, Origins, origin_of, run_wide
from sparsetrain.config.overrides import apply_overrides
from sparsetrain.config.problem import ABSENT, InvalidConfig, Problem
from sparsetrain.config.run import RunConfig, complete
from sparsetrain.config.yaml_file import read_yaml_file
from sparsetrain.errors import ConfigError

_STAND_INS: dict[str, Any] = {"name": "unnamed", "model": {"dim": 64, "num_layers": 1, "num_heads": 1}}
"""Taken for required keys that are broken, only so that the rest of a config can still be checked."""


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    was_trained: bool = False,
) -> RunConfig:
    """Read a run's YAML.

    Args:
        path: The file.
        overrides: `key=value` each, as on the command line: `["train.tokens=2M", "sparsity.0.sparsity=0.5"]`.
        world_size: Number of ranks, where something other than `cluster.workers` decides it (torchrun).
        was_trained: The file is that of a run that has begun, and need not fit any number of ranks: on how many it was
            trained, it does not say where something other than `cluster.workers` decided.

    Raises:
        ConfigError: The file cannot be read or is not YAML; or anything in it is wrong: the message lists all of it,
            each with file and line (or override), key, value and fix.
    """
    parsed = apply_overrides(_read_mapping(path), overrides)
    config, problems = _validate(parsed.value, parsed.origins, world_size, checks_ranks=not was_trained)
    problems = [*parsed.problems, *problems]
    if problems:
        raise InvalidConfig(str(path), sorted(problems, key=_place))
    assert config is not None
    return config


def locate(error: InvalidConfig, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> InvalidConfig:
    """Tell where in a file, or in which override, the keys stand that a later check has refused.

    Args:
        error: What a check of the loaded config raised; it knows keys and values only.
        path: The file that the config was loaded from.
        overrides: Those it was loaded with.
    """
    if all(problem.where is not None for problem in error.problems):
        return error
    parsed = apply_overrides(_read_mapping(path), overrides)
    located = [
        replace(problem, where=origin_of(problem.path, parsed.origins)) if problem.where is None else problem
        for problem in error.problems
    ]
    return InvalidConfig(str(path), sorted(located, key=_place))


def _read_mapping(path: str | os.PathLike[str]) -> Any:
    parsed = read_yaml_file(Path(path))
    if parsed.value is None and not parsed.problems:
        raise ConfigError(f"{path} is empty; a run needs at least name, model and train")
    if not isinstance(parsed.value, dict):
        raise ConfigError(f"{path}:1: expected keys with values (name, model, train, ...), and this is not that")
    return parsed


def _validate(
    raw: Any, origins: Origins, world_size: int | None, *, checks_ranks: bool
) -> tuple[RunConfig | None, list[Problem]]:
    """Find all problems: where a section is broken, it is taken out and the rest is checked further."""
    raw = copy.deepcopy(raw)
    problems: list[Problem] = []
    broken: set[KeyPath] = set()
    while True:
        completed = complete(raw)
        try:
            config = RunConfig.model_validate(completed)
            break
        except ValidationError as error:
            found = problems_of(error, completed, origins)
        misspelt = {meant for problem in found for meant in _meant(problem.path, completed)}
        found = [problem for problem in found if problem.path not in misspelt or problem.value is not ABSENT]
        problems += [problem for problem in found if not _touches(problem.path, broken)]
        for problem in found:
            broken |= {problem.path, *_meant(problem.path, completed)}
        if not _mend(raw, [problem.path for problem in found]):
            return None, problems
    clashes = [*conflicts(config)]
    if checks_ranks:
        clashes += _first_world_conflicts(config, world_size)
    for clash in clashes:
        if not any(_touches(path, broken) for path in (clash.path, *clash.others)):
            problems.append(_as_problem(clash, completed, origins))
    return config, problems


def _first_world_conflicts(config: RunConfig, world_size: int | None) -> list[Conflict]:
    """What does not fit one of the numbers of ranks that the run may have, beginning with all its workers."""
    sizes = [world_size] if world_size else reversed(config.cluster.world_sizes)
    return next(filter(None, (list(world_conflicts(config, size)) for size in sizes)), [])


def _as_problem(clash: Conflict, raw: Any, origins: Origins) -> Problem:
    written = value_at(raw, clash.path)
    value = clash.value if written is ABSENT else written
    return Problem(clash.path, clash.message, origin_of(clash.path, origins), value)


def _touches(path: KeyPath, broken: Iterable[KeyPath]) -> bool:
    """Whether a path lies in, or holds, one that is known to be broken."""
    ours = {path, run_wide(path)}
    theirs = {variant for known in broken for variant in (known, run_wide(known))}
    return any(a[: len(b)] == b or b[: len(a)] == a for a in ours for b in theirs)


def _meant(path: KeyPath, raw: Any) -> list[KeyPath]:
    """The key of which an unknown key is probably a misspelling; that the right one is missing is not worth a line."""
    section = section_at(path[:-1], raw)
    if section is None or not path or path[-1] in section.model_fields:
        return []
    near = nearest(str(path[-1]), section.model_fields)
    return [(*path[:-1], near)] if near else []


def _mend(raw: Any, paths: Sequence[KeyPath]) -> bool:
    """Take out what stands at the paths, or put in what cannot be missing; False if that leaves nothing to check."""
    removed = [_take_out(raw, path) for path in paths]
    if any(removed):
        return True
    missing = {path[0] for path in paths} & _STAND_INS.keys() - raw.keys()
    raw.update({key: copy.deepcopy(_STAND_INS[str(key)]) for key in missing})
    return bool(missing)


def _take_out(raw: Any, path: KeyPath) -> bool:
    """Remove the value at a path, or the nearest section around it that is there."""
    around = [path[:end] for end in range(len(path) - 1, 0, -1)]
    for *parents, key in (path, run_wide(path), *around):
        parent = value_at(raw, tuple(parents))
        if isinstance(parent, dict) and key in parent:
            del parent[key]
            return True
    return False


def _place(problem: Problem) -> tuple[int, int]:
    """Sort by line; what overrides do comes last."""
    return (0, problem.where.line) if isinstance(problem.where, FilePosition) else (1, 0)

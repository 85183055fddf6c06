"""`train.tokens=2M`: changes to a config on the command line."""

import copy
from collections.abc import Sequence
from typing import Any

from sparsetrain.config.navigate import is_list, is_one_or_many, section_at
from sparsetrain.config.origin import KeyPath, OverridePosition, dotted
from sparsetrain.config.problem import Problem
from sparsetrain.config.yaml_file import ParsedYaml, parse_yaml
from sparsetrain.errors import ConfigError


def apply_overrides(parsed: ParsedYaml, overrides: Sequence[str]) -> ParsedYaml:
    """Put `key=value` overrides into a parsed file, in order; keys are dotted, list items numbered from 0.

    A value is YAML (`[]`, `2M`, `{kind: cubic}`). Sections that the file leaves out are begun. What cannot be put
    anywhere becomes a problem of the result; keys that the schema does not know are left for the schema to refuse.
    """
    result = ParsedYaml(copy.deepcopy(parsed.value), dict(parsed.origins), list(parsed.problems))
    for text in overrides:
        where = OverridePosition(text)
        changed = copy.deepcopy(result)  # an override that fails halfway leaves no sections that it has begun
        try:
            path, value = _parse(text)
            _put(changed, path, value, where)
            result = changed
        except ConfigError as error:
            result.problems.append(Problem((), str(error), where))
    return result


def _parse(text: str) -> tuple[KeyPath, ParsedYaml]:
    key, equals, value_text = text.partition("=")
    if not equals or not key.strip() or not all(key.strip().split(".")):
        raise ConfigError("expected key=value, for example train.tokens=2M")
    try:
        value = parse_yaml(value_text, "value")
    except ConfigError as error:
        raise ConfigError(f"the value is {str(error).partition(': ')[2]}") from None
    if value.problems:
        raise ConfigError("; ".join(problem.message for problem in value.problems))
    return tuple(int(part) if part.isdecimal() else part for part in key.strip().split(".")), value


def _put(result: ParsedYaml, path: KeyPath, new: ParsedYaml, where: OverridePosition) -> None:
    node = result.value
    for depth, element in enumerate(path):
        here, last = path[:depth], depth == len(path) - 1
        node = _open(result, node, here, element)
        if last:
            node[element] = new.value
        elif (node.get(element) if isinstance(node, dict) else node[element]) is None:
            node[element] = _begin(path[: depth + 1], path[depth + 1], result.value)
            result.origins[path[: depth + 1]] = where
        node = node[element]
    for known in [known for known in result.origins if known[: len(path)] == path]:
        del result.origins[known]
    result.origins[path] = where
    result.origins.update({(*path, *inner): where for inner in new.origins})


def _begin(path: KeyPath, inside: str | int, raw: Any) -> Any:
    """What to begin at `path`, where nothing is yet, so that it can hold `inside`."""
    if is_one_or_many(path, raw):
        return {} if isinstance(inside, str) else [None] if inside == 0 else []
    return [] if is_list(path, raw) else {}


def _open(result: ParsedYaml, node: Any, here: KeyPath, element: str | int) -> Any:
    """The container at `here` that is to hold `element`; a short form (`cosine`) becomes the section it stands for."""
    name = dotted(here) or "the config"
    if isinstance(node, list):
        if isinstance(element, str):
            raise ConfigError(f"{name} is a list; write {dotted((*here, 0, element))} for its first item")
        if element >= len(node):
            holds = f"its last item is {len(node) - 1}" if node else "it is empty"
            raise ConfigError(f"{name} has no item {element}; {holds}")
        return node
    if isinstance(node, str) and isinstance(element, str):
        section = section_at(here, result.value)
        if section is not None and "kind" in section.model_fields:
            return _replace(result.value, here, {"kind": node})
    if not isinstance(node, dict):
        raise ConfigError(f"{name} is a single value and has no keys")
    if isinstance(element, int):
        raise ConfigError(f"{name} is not a list and has no item {element}")
    return node


def _replace(raw: Any, path: KeyPath, value: dict[str, Any]) -> dict[str, Any]:
    for element in path[:-1]:
        raw = raw[element]
    raw[path[-1]] = value
    return value

"""pydantic's validation errors -> problems in the words of the YAML."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sparsetrain.config.base import KeyConflict, Section, explain_with
from sparsetrain.config.navigate import kinds_of, nearest, section_at, sections_in, suggest_key
from sparsetrain.config.origin import KeyPath, Origins, origin_of, run_wide
from sparsetrain.config.problem import ABSENT, InvalidConfig, Problem
from sparsetrain.config.run import RunConfig, complete


def problems_of(
    error: ValidationError, raw: Any, origins: Origins | None = None, top: type[Section] = RunConfig
) -> list[Problem]:
    """Everything that pydantic found wrong.

    Args:
        error: What validating `raw` as `top` raised.
        raw: The plain values, completed as a run's are (`complete`).
        origins: Where they were written.
        top: The section that `raw` is.
    """
    found: dict[tuple[KeyPath, str], Problem] = {}
    for item in error.errors(include_url=False):
        path, message = _explain(item, _path_of(item["loc"], raw), raw, top)
        if (run_wide(path), message) in found:
            continue  # a phase inherits its run's mistakes; they are mentioned once
        where = origin_of(path, origins) if origins else None
        found[path, message] = Problem(path, message, where, value_at(raw, path))
    return list(found.values())


def invalid_section(section: type[Section], values: Mapping[str, Any], error: ValidationError) -> InvalidConfig:
    """The error for a section that was made in Python, not read from a file."""
    raw = complete(values) if section is RunConfig else values
    return InvalidConfig(section.__name__, problems_of(error, raw, top=section))


explain_with(invalid_section)


def value_at(raw: Any, path: KeyPath) -> Any:
    """The value at a path of plain dicts and lists, or ABSENT."""
    for element in path:
        holds = isinstance(raw, dict) and element in raw
        if isinstance(raw, list | tuple) and isinstance(element, int):
            holds = element < len(raw)
        if not holds:
            return ABSENT
        raw = raw[element]
    return raw if raw is None or isinstance(raw, bool | int | float | str | list | dict) else ABSENT


def _path_of(loc: tuple[str | int, ...], raw: Any) -> KeyPath:
    """Where in the YAML pydantic's `loc` points.

    pydantic adds the tag of the union member that it chose (the section's `kind`, or a tag of ours in `<>`), and
    an index where one value stands for a list of one.
    """
    path: list[str | int] = []
    node = raw
    for element in loc:
        if isinstance(element, int):
            if isinstance(node, list | tuple):
                path.append(element)
                node = node[element] if element < len(node) else None
        elif not (element.startswith("<") or element == _kind(node)):
            path.append(element)
            node = node.get(element) if isinstance(node, dict) else None
    return tuple(path)


def _kind(node: Any) -> Any:
    if isinstance(node, str):
        return "file" if node.endswith(".json") else node
    return node.get("kind") if isinstance(node, dict) else None


def _explain(item: Any, path: KeyPath, raw: Any, top: type[Section]) -> tuple[KeyPath, str]:
    """The path that is to blame and what is wrong with it."""
    kind, context = item["type"], item.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, KeyConflict):
        return (*path, *cause.key.split(".")), cause.message
    if kind == "value_error":
        return path, str(cause)
    if kind == "extra_forbidden":
        return path, f"unknown key; {suggest_key(path, raw, top)}"
    if kind == "missing":
        return path, "missing, the list is too short" if isinstance(
            path[-1], int
        ) else f"missing{_meaning(path, raw, top)}"
    value = value_at(raw, path)
    if kind == "literal_error" and item["loc"][-1] == "<keep>":
        return path, "expected keep or a list of rules"
    if kind == "literal_error":
        return path, _one_of(re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]], value)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = list(kinds_of(_choices(path, raw, top)))
        if isinstance(value, dict):
            chosen = value.get("kind", ABSENT)
            return (*path, "kind"), ("missing; " if chosen is ABSENT else "") + _one_of(kinds, chosen)
        return path, _one_of(kinds, value)
    if value is None and kind.endswith("_type"):
        return path, "has no value; write one or remove the key"
    return path, _PLAIN.get(kind, item["msg"]).format(**context)


_PLAIN = {
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "finite_number": "expected a finite number",
    "float_type": "expected a number, without quotes",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "expected a whole number, without quotes",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "model_attributes_type": "expected a section, that is keys with values",
    "model_type": "expected a section, that is keys with values",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "must not be empty",
    "string_type": 'expected text; put it in quotes ("...") if it is meant to be text',
    "too_long": "expected at most {max_length} values, and there are {actual_length}",
    "too_short": "expected at least {min_length} value(s), and there are {actual_length}",
    "tuple_type": "expected a list",
}


def _one_of(allowed: list[str], value: Any) -> str:
    if len(allowed) == 1:
        return f"expected {allowed[0]}"
    near = nearest(value, allowed) if isinstance(value, str) else None
    return f"expected one of {', '.join(allowed)}" + (f"; did you mean {near}?" if near else "")


def _choices(path: KeyPath, raw: Any, top: type[Section]) -> list[type[Section]]:
    """The sections that the schema allows at a path."""
    named = path if isinstance(path[-1], str) else path[:-1]
    parent = section_at(named[:-1], raw, top)
    return sections_in(parent.model_fields[str(named[-1])].annotation) if parent else []


def _meaning(path: KeyPath, raw: Any, top: type[Section]) -> str:
    """What a missing key is for: the first sentence of its description."""
    section = section_at(path[:-1], raw, top)
    field = section.model_fields.get(str(path[-1])) if section else None
    text = field.description if field else None
    return f" ({' '.join(text.split()).split('. ')[0].rstrip('.')})" if text else ""

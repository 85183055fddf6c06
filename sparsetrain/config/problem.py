"""One thing that is wrong with a config, and how a list of them reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

import yaml

from sparsetrain.config.origin import KeyPath, OverridePosition, Position, dotted
from sparsetrain.errors import ConfigError


class Absent(Enum):
    """Stands for the value of a key that was not written; an enum, so that it stays itself between processes."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT

_SHOWN_CHARACTERS = 48


@dataclass(frozen=True)
class Problem:
    """`where: key = value: message` is the line that a person reads."""

    path: KeyPath
    message: str
    where: Position | None = None
    value: Any = ABSENT

    def __str__(self) -> str:
        key = dotted(self.path)
        if isinstance(self.where, OverridePosition) and self.where.text.startswith(f"{key}="):
            return f"{self.where}: {self.message}"
        if self.value is not ABSENT and not isinstance(self.value, dict):
            key = f"{key} = {show(self.value)}"
        return ": ".join(part for part in (str(self.where or ""), key, self.message) if part)


class InvalidConfig(ConfigError):
    """All that is wrong with one config; `problems` holds it in order."""

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{name} has {count}", "", *map(str, problems)]))
        self.name = name
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[Self], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.name, self.problems)


def show(value: Any) -> str:
    """Write a value the way it stands in YAML, on one line and not too long."""
    try:
        if isinstance(value, str) and not value.isprintable():
            return _short(json.dumps(value))
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError:  # a section made in Python can be given anything
        text = repr(value)
    return _short(text.removesuffix("\n").removesuffix("\n..."))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."

"""Where each value of a config was written: a line of a file, or an override on the command line."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""The way to a value from the top of the config: `("sparsity", 0, "schedule", "start")`."""


@dataclass(frozen=True)
class FilePosition:
    """A place in a YAML file."""

    file: str
    line: int
    """Counted from 1."""
    column: int
    """Counted from 1."""
    source_line: str
    """The text of that line, for showing; empty where the position is the whole file's."""
    width: int = 1
    """Characters from `column` onwards that the position covers."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class OverridePosition:
    """A `key=value` on the command line, as it was typed."""

    text: str

    def __str__(self) -> str:
        return f"override {self.text}"


Position = FilePosition | OverridePosition
Origins = Mapping[KeyPath, Position]
"""Where each key of a config was written; only keys that were written are in it."""


def dotted(path: Iterable[str | int]) -> str:
    """Write a path the way overrides are typed: `sparsity.0.schedule.start`."""
    return ".".join(map(str, path))


def run_wide(path: KeyPath) -> KeyPath:
    """The key of the run from which a key of a phase is inherited, or the path itself.

    `train.phases.0.data.seq_len` is `data.seq_len` wherever the phase does not say otherwise.
    """
    inherits = len(path) > 3 and path[:2] == ("train", "phases") and path[3] in ("data", "optimizer")
    return path[3:] if inherits else path


def origin_of(path: KeyPath, origins: Origins) -> Position | None:
    """Where a key was written; for one that was not, where the section is that lacks it."""
    for exact in (path, run_wide(path)):
        if exact in origins:
            return origins[exact]
    while path:
        path = path[:-1]
        if path in origins:
            return origins[path]
    return None

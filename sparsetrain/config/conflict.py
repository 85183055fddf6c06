"""Keys of different sections that do not fit together."""

from dataclasses import dataclass

from sparsetrain.config.origin import KeyPath


@dataclass(frozen=True)
class Conflict:
    """Keys that do not fit together; `path` is the one to change first, `others` are the rest."""

    path: KeyPath
    value: object
    message: str
    others: tuple[KeyPath, ...] = ()

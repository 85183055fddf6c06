"""What differs between the config that a run was started with and the one it is to go on with."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparsetrain.config import RunConfig

MAY_CHANGE = (
    "output",
    "cluster.*",
    "checkpoint.*",
    "parallel.*",
    "engine_overrides.*",
    "train.micro_batch_size",
    "train.eval_every_steps",
    "train.max_bad_steps",
    "train.compile",
    "train.activation_checkpointing",
    # Where text lies, not what it says: that is compared by content, see RunFolder.describe_data.
    "*data.cache",
    "*data.source.*.name",
    "*data.source.*.paths*",
    "*data.source.*.prefixes*",
    "*data.tokenizer.path",
)
"""Keys that a resumed run may change: where and how it computes. All others decide what it computes."""


@dataclass(frozen=True)
class Change:
    """One key whose value differs."""

    key: str
    before: Any
    now: Any

    @property
    def allowed(self) -> bool:
        """Whether a run may go on with it."""
        return any(fnmatchcase(self.key, pattern) for pattern in MAY_CHANGE)

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} there, {_shown(self.now)} here"


def config_changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every key whose value differs, by its dotted name, in the order of the config."""
    return list(_changes("", before.model_dump(mode="json"), now.model_dump(mode="json")))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _changes(key: str, before: Any, now: Any) -> Iterator[Change]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _changes(f"{key}.{name}" if key else name, before.get(name), now.get(name))
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            yield Change(key, f"{len(before)} entries", f"{len(now)} entries")
        for index, (old, new) in enumerate(zip(before, now, strict=False)):
            yield from _changes(f"{key}.{index}", old, new)
    elif not _same(before, now):
        yield Change(key, before, now)


def _same(before: Any, now: Any) -> bool:
    """Whether two values are equal; paths that one side has made absolute are."""
    if isinstance(before, str) and isinstance(now, str):
        return before == now or Path(before).expanduser().absolute() == Path(now).expanduser().absolute()
    return bool(before == now)

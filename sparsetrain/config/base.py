"""What every section of the config has in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of the YAML: frozen, typed, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def kind_from_text(value: Any) -> Any:
    """Let `uniform` stand for `{kind: uniform}`: the short form of a section that needs nothing else."""
    return {"kind": value} if isinstance(value, str) else value

"""What every section of the config has in common."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

Int = Annotated[int, Strict()]
"""An integer written as a number: neither `true` nor `"3"` stands for one."""

Real = Annotated[float, Strict()]
"""A finite number; an integer stands for one, `true` and `"0.1"` do not."""


class Section(BaseModel):
    """One part of the YAML: frozen, typed, and closed to keys it does not know.

    Raises:
        ConfigError: From the constructor, naming every key that is wrong.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            if _explain is None:
                raise
            raise _explain(type(self), values, error) from None

    # Lets pydantic build nested sections without coming through here, so that it collects all errors before it raises.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


Explain = Callable[[type[Section], dict[str, Any], ValidationError], Exception]
"""From a section, what it was made of and what pydantic found wrong, the error that a person reads."""

_explain: Explain | None = None


def explain_with(explain: Explain) -> None:
    """Set how the constructors of sections explain what is wrong.

    A hook, because the explanation needs the whole schema, and the schema stands on this file.
    """
    global _explain
    _explain = explain


class KeyConflict(ValueError):
    """A key of a section that does not go with another key of it; raised by validators of the schema."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        """Dotted, relative to the section."""
        self.message = message


def kind_from_text(value: Any) -> Any:
    """Let `uniform` stand for `{kind: uniform}`: the short form of a section that needs nothing else."""
    return {"kind": value} if isinstance(value, str) else value


def one_or_many(value: Any) -> Any:
    """Let one value stand for a list of it."""
    return [value] if isinstance(value, str | dict | Section) else value

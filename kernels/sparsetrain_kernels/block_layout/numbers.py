"""Checks of the numbers that patterns and layouts are made from."""

from numbers import Integral


def check_integer(name: str, value: object, *, least: int = 1) -> None:
    """Raise ValueError unless it is an integer of at least `least`; True and 2.0 are none.

    Args:
        name: What the message calls it.
        value: The number.
        least: The least that is allowed.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")

"""Counts with units: `4M` tokens, `16Ki` tokens, `1.5B` parameters.

`k M B T` are powers of ten, `Ki Mi Gi Ti` powers of 1024, as everywhere in the YAML.
"""

import math
import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "B": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_EXPECTED = "expected a count such as 4096, 4M or 16Ki"
_COUNT = re.compile(r"^\s*([0-9]+(?:_[0-9]+)*|[0-9]*\.?[0-9]+(?:[eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)\s*$")


def parse_count(value: Any) -> int:
    """Turn `4M`, `16Ki`, `2e6` or a plain number into an integer.

    Raises:
        ValueError: The text is not a number with a known unit, or it is not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(_EXPECTED)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(_EXPECTED)
        return _whole(Fraction(value))
    match = _COUNT.match(value)
    if match is None:
        raise ValueError(_EXPECTED)
    number, unit = match.groups()
    if unit not in _UNITS:
        meant = [known for known in _UNITS if known and known[0].lower() == unit[0].lower()]
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"units are {' '.join(filter(None, _UNITS))}"
        raise ValueError(f"unknown unit {unit}; {hint}")
    return _whole(Fraction(number) * _UNITS[unit])


def format_count(count: int) -> str:
    """Write a count the way a person would: `4.19M`, `512`."""
    for unit in ("T", "B", "M", "k"):
        if abs(count) >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g}{unit}"
    return str(count)


def divisors_near(whole: int, wrong: int) -> str:
    """Say which divisors of `whole` lie next to `wrong`, for people: `4 and 6 do`."""
    reach = 10_000  # whoever is further off than that does not want the nearest
    below = next((part for part in range(min(wrong, whole), max(wrong - reach, 0), -1) if whole % part == 0), 1)
    above = next((part for part in range(wrong + 1, min(whole, wrong + reach) + 1) if whole % part == 0), None)
    return f"{below} does" if above is None else f"{below} and {above} do"


def _whole(value: Fraction) -> int:
    if value.denominator != 1:
        raise ValueError(f"expected a whole number, and this is {float(value):g}")
    return value.numerator


Count = Annotated[int, BeforeValidator(parse_count)]
"""An integer that may be written with a unit."""

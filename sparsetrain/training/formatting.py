"""Figures as a person reads them, in the progress display and the reports."""

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:12:05`, `4 d 3 h`."""
    whole = max(0, round(seconds))
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def scaled(value: float) -> str:
    """Three digits and a unit of powers of ten: `812`, `23.1k`, `1.52G`; a dash for what is not finite."""
    if not math.isfinite(value):
        return MISSING
    for power, unit in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return _three_digits(value / 10**power) + unit
    return _three_digits(value)


def quantity(value: float, unit: str) -> str:
    """`12.3 MB`, `190 GFLOP/s`."""
    text = scaled(value)
    return f"{text[:-1]} {text[-1]}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def percent(share: float, digits: int = 1) -> str:
    """`41.2 %`."""
    return f"{100 * share:.{digits}f} %"


def number(value: Any, form: str) -> str:
    """Format a figure; a dash for one that is missing or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    return format(value, form)


def step_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of a row of metrics.jsonl, in the order in which they are shown."""
    tokens_per_s, utilisation = row.get("tokens_per_s"), row.get("mfu")
    figures = [
        ("loss", number(row.get("loss"), ".3f")),
        ("tok/s", MISSING if number(tokens_per_s, "g") == MISSING else scaled(float(tokens_per_s or 0))),
        ("MFU", MISSING if number(utilisation, "g") == MISSING else percent(float(utilisation or 0))),
        ("density", number(row.get("density"), ".3f")),
        ("lr", number(row.get("lr"), ".1e")),
        ("grad norm", number(row.get("grad_norm"), ".2f")),
    ]
    for key, label in (("expert_imbalance", "expert max/mean"), ("device_imbalance", "rank max/mean")):
        if key in row:
            figures.append((label, number(row[key], ".2f")))
    return figures


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return (
        f"{value:.0f}" if magnitude >= 99.95 or value == round(value) else f"{value:.{1 if magnitude >= 9.995 else 2}f}"
    )

"""Rows as one aligned text table, and as CSV."""

import csv
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from bench.machine import Machine
from bench.registry import Row

_HEADER = ("case", "ours", "peer", "ratio [95% CI]", "target", "verdict")


def format_table(rows: Sequence[Row]) -> str:
    """Align the rows under a header, with their notes below."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"  {row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], *([""] if notes else []), *notes])


def write_csv(path: Path, rows: Sequence[Row], machine: Machine, num_threads: int) -> None:
    """Write one case's rows with what is needed to read them in a year."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {
        "threads": num_threads,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": " ".join(f"{name}={number}" for name, number in machine.versions.items()),
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            record = _record(row) | dict(row.details) | stamp
            if writer is None:
                writer = csv.DictWriter(file, record.keys())
                writer.writeheader()
            writer.writerow(record)


def _cells(row: Row) -> tuple[str, ...]:
    figure = row.figure
    ratio = f"{figure.median:.4g} [{figure.low:.4g}, {figure.high:.4g}]" if row.peer else ""
    peer = f"{_amount(np.median(row.peer), row.unit)} {row.peer_name}" if row.peer else row.peer_name
    return (row.name, _amount(figure_of(row.ours), row.unit), peer, ratio, str(row.target or ""), row.verdict)


def _record(row: Row) -> dict[str, object]:
    figure = row.figure
    return {
        "case": row.name,
        "ours": f"{figure_of(row.ours):.6g}",
        "peer": f"{figure_of(row.peer):.6g}" if row.peer else "",
        "unit": row.unit,
        "peer_name": row.peer_name,
        "figure": f"{figure.median:.6g}",
        "low": f"{figure.low:.6g}",
        "high": f"{figure.high:.6g}",
        "target": str(row.target or ""),
        "verdict": row.verdict,
        "samples": len(row.ours),
        "note": row.note,
    }


def figure_of(samples: Sequence[float]) -> float:
    """The middle of the samples."""
    return float(np.median(samples))


def _amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.4g} {unit}".rstrip()
    return f"{value * 1e3:.4g} ms" if value < 10 else f"{value:.4g} s"

"""Measured times of every implementation at every measured problem, and the rule that reads them.

The rule. Of the problems measured within a factor of two in every size and in threads (or the factors that an operation
names), and at the least density that is not below the wanted one (what is sparser only gains more), an implementation
qualifies when it beat dense by the margin at all of them, and the fastest qualified one at the nearest is chosen. Where
nothing was measured so, or the hardware has no table, the operation says what runs: dense, unless it names another.

A table is the one tuned on this machine (`own_table`), or else the one shipped for its hardware (`tables/`).
"""

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from math import log2, prod
from pathlib import Path
from typing import IO, NamedTuple

import torch

DENSE = "dense"
MARGIN = 1.05
"""How many times faster than dense an implementation must have been: neighbours are not quite what was measured."""
NEAR = 1.0
"""log2 of the largest factor between a problem and a measured one that counts as near."""
DIRECTORY_VARIABLE = "SPARSETRAIN_DISPATCH_DIR"

_REMEDY = "delete it, or measure anew with `sparsetrain doctor --tune`"
_COLUMNS = ("operation", "variant", "dtype", "threads", "sizes", "density", "milliseconds")


class TableError(ValueError):
    """A file of measured times cannot be read; the message says which, where, and what would do."""


class Problem(NamedTuple):
    """What a choice depends on."""

    operation: str
    variant: str
    """What else tells kernels apart, such as the size of blocks."""
    device: str
    """cpu or cuda."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    """Sizes in the operation's own order, such as tokens, outputs, inputs."""
    density: float
    """Share of the dense work that is left."""
    threads: int
    """Threads of a CPU operation; 1 on a GPU."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for a problem and why."""

    problem: Problem
    implementation: str
    reason: str
    seconds: float | None = None
    """Expected time: that of the nearest measured problem, scaled by the work; None where nothing was measured near."""
    dense_seconds: float | None = None

    def __str__(self) -> str:
        problem = self.problem
        sizes = "x".join(map(str, problem.sizes))
        what = f"{problem.operation} [{problem.variant}] {sizes}, density {problem.density:.3g}"
        where = f"{str(problem.dtype).removeprefix('torch.')} on {problem.device}"
        return f"{what}, {where}: {self.implementation} ({self.reason})"


@dataclass
class Table:
    """Times by problem and implementation, of one machine."""

    hardware: str
    times: dict[Problem, dict[str, float]] = field(default_factory=dict)
    """Seconds of each implementation that was measured; dense is always among them."""

    def choose(
        self,
        problem: Problem,
        candidates: Iterable[str],
        near_sizes: tuple[float, ...] = (),
        unmeasured: tuple[str, str] = (DENSE, ""),
    ) -> Choice:
        """Apply the rule above to the implementations that can run here.

        Args:
            problem: What is to be computed.
            candidates: Names of implementations besides dense.
            near_sizes: See `Operation.near`.
            unmeasured: What runs, and why, where nothing was measured near.
        """
        candidates = list(candidates)
        if not candidates:
            return Choice(problem, DENSE, "no other implementation computes this here")
        near = self._near(problem, near_sizes)
        if not near:
            name, why = unmeasured
            reason = f"nothing was measured near this problem on {self.hardware}" + (f"; {why}" if why else "")
            return Choice(problem, name, reason)
        nearest = min(near, key=lambda other: distance(problem, other, near_sizes))
        times = self.times[nearest]
        qualified = [name for name in candidates if all(_beats_dense(self.times[other], name) for other in near)]
        best = min(qualified, key=lambda name: times[name], default=DENSE)
        scale = work(problem) / work(nearest)
        reason = _reason(times, best, nearest, scale)
        return Choice(problem, best, reason, times[best] * scale, times[DENSE] * scale)

    def _near(self, problem: Problem, near_sizes: tuple[float, ...]) -> list[Problem]:
        near = [
            other
            for other in self.times
            if _comparable(problem, other)
            and other.density >= problem.density
            and distance(problem, other, near_sizes) <= NEAR
        ]
        least = min((other.density for other in near), default=0.0)
        return [other for other in near if other.density == least]

    def write(self, path: Path) -> None:
        """Write the table as CSV, with the times of a problem in its last column: "dense=1.2 gather=0.4"."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            for problem, times in self.times.items():
                dtype, sizes = str(problem.dtype).removeprefix("torch."), "x".join(map(str, problem.sizes))
                milliseconds = " ".join(f"{name}={seconds * 1e3:.4g}" for name, seconds in times.items())
                what = (problem.operation, problem.variant, dtype, problem.threads, sizes, problem.density)
                writer.writerow((*what, milliseconds))

    @classmethod
    def read(cls, file: IO[str], hardware: str, device: str) -> "Table":
        """Read a table that `write` wrote for this kind of device.

        Raises:
            TableError: It is not such a table.
        """
        table = cls(hardware)
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise TableError(f"{file.name}: its first line must be {','.join(_COLUMNS)}; {_REMEDY}")
        for row in reader:
            try:
                problem, times = _parse(row, device)
            except (ValueError, AttributeError, TypeError) as error:
                raise TableError(f"{file.name}, line {reader.line_num}: no row of times ({error}); {_REMEDY}") from None
            table.times[problem] = times
        return table


def _parse(row: Mapping[str, str], device: str) -> tuple[Problem, dict[str, float]]:
    """A line of the file; raises ValueError, AttributeError or TypeError where it is none."""
    problem = Problem(
        operation=row["operation"],
        variant=row["variant"],
        device=device,
        dtype=getattr(torch, row["dtype"]),
        sizes=tuple(map(int, row["sizes"].split("x"))),
        density=float(row["density"]),
        threads=int(row["threads"]),
    )
    entries = (entry.split("=") for entry in row["milliseconds"].split())
    times = {name: float(milliseconds) / 1e3 for name, milliseconds in entries}
    if DENSE not in times:
        raise ValueError(f"there is no time of {DENSE}")
    return problem, times


def own_table(hardware: str) -> Path:
    """Where tuning writes, and where reading looks before it takes the shipped table."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(DIRECTORY_VARIABLE) or cache / "sparsetrain" / "dispatch") / f"{hardware}.csv"


def shipped_table(hardware: str) -> Path:
    """Where the table of a kind of hardware is in this package; there need not be one."""
    return Path(str(files(__package__))) / "tables" / f"{hardware}.csv"


def load_table(hardware: str, device: str) -> Table:
    """The table tuned on this machine, else the one shipped for its hardware, else an empty one.

    Raises:
        TableError: The first of them that there is cannot be read.
    """
    for place in (own_table(hardware), shipped_table(hardware)):
        if place.is_file():
            with place.open() as file:
                return Table.read(file, hardware, device)
    return Table(hardware)


def distance(one: Problem, other: Problem, near_sizes: tuple[float, ...] = ()) -> float:
    """log2 of the largest factor between two problems in any size, in units of `near_sizes`, or in threads."""
    pairs = zip((*one.sizes, one.threads), (*other.sizes, other.threads), strict=True)
    units: tuple[float, ...] = (*(near_sizes or (NEAR,) * len(one.sizes)), NEAR)
    return max(_log2_factor(a, b) / unit for (a, b), unit in zip(pairs, units, strict=True))


def _log2_factor(a: int, b: int) -> float:
    if a and b:
        return abs(log2(a / b))
    return 0.0 if a == b else float("inf")


def work(problem: Problem) -> float:
    """Number that both times of a problem grow with."""
    return prod(problem.sizes) / problem.threads


def _comparable(one: Problem, other: Problem) -> bool:
    return one[:4] == other[:4] and len(one.sizes) == len(other.sizes)


def _beats_dense(times: Mapping[str, float], name: str) -> bool:
    return times.get(name, float("inf")) * MARGIN <= times[DENSE]


def _reason(times: Mapping[str, float], best: str, measured: Problem, scale: float) -> str:
    at = f"by {'x'.join(map(str, measured.sizes))} at density {measured.density:.3g}, {measured.threads} threads"
    dense_ms = times[DENSE] * scale * 1e3
    if best != DENSE:
        return f"expected {times[best] * scale * 1e3:.3g} ms, dense {dense_ms:.3g} ms, {at}"
    others = {name: seconds for name, seconds in times.items() if name != DENSE}
    if not others:
        return f"expected {dense_ms:.3g} ms, nothing else runs here, {at}"
    name = min(others, key=lambda name: others[name])
    return f"expected {dense_ms:.3g} ms, {name} {others[name] * scale * 1e3:.3g} ms is no clear gain, {at}"

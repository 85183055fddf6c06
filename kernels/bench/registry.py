"""What a benchmark case is, and the registry that the runner reads.

A case is a generator of rows, in its own file under `cases/`:

    @case("sort", "our sort over numpy's")
    def sort(bench: Bench) -> Iterator[Row]:
        yield bench.compare("sort 1M floats", ours=our_sort, peer=numpy_sort, peer_name="numpy", target=AtLeast(1.2))

Import a peer inside the function and raise `Unavailable` when it is missing: the other cases still run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.measure import Interval, interleave, median_interval, ratio_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Unavailable(Exception):
    """A case cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class AtLeast:
    """The figure is peer ÷ ours (a speed-up where the samples are seconds), and should reach `bound`."""

    bound: float

    def __str__(self) -> str:
        return f"≥ {self.bound:g}"


@dataclass(frozen=True)
class AtMost:
    """The figure is ours ÷ peer (a cost where the samples are seconds), and should stay below `bound`."""

    bound: float

    def __str__(self) -> str:
        return f"≤ {self.bound:g}"


@dataclass(frozen=True)
class Within:
    """The figure is ours ÷ peer, or ours alone, and should lie within `tolerance` of `value`."""

    value: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.value:g} ± {self.tolerance:g}"


Target = AtLeast | AtMost | Within


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Without a peer the figure is the median of `ours` itself. With a peer, `ours[i]` and `peer[i]` were measured right
    after each other and the figure is the median over i of their ratio, in the direction that the target asks for;
    without a target it is peer ÷ ours.
    """

    name: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    peer_name: str = ""
    target: Target | None = None
    unit: str = "s"
    """Unit of the samples; "" for a plain number."""
    note: str = ""
    details: Mapping[str, float | str] = field(default_factory=dict)
    """Further columns of the CSV, the same in all rows of a case; its plots are drawn from them."""

    @property
    def figure(self) -> Interval:
        """Median and 95 % bootstrap confidence interval of the figure."""
        if not self.peer:
            return median_interval(self.ours)
        if self.target is None or isinstance(self.target, AtLeast):
            return ratio_interval(self.peer, self.ours)
        return ratio_interval(self.ours, self.peer)

    @property
    def verdict(self) -> str:
        """met | missed when the whole interval agrees, else met? | missed? by the median."""
        figure = self.figure
        if self.target is None:
            return ""
        met = [_meets(self.target, value) for value in (figure.median, figure.low, figure.high)]
        return ("met" if met[0] else "missed") + ("" if len(set(met)) == 1 else "?")


@dataclass(frozen=True)
class Bench:
    """What a case is given: how long it may take, and the timer."""

    quick: bool
    """Few repetitions: for finding out whether a case runs, not for figures."""
    num_threads: int
    """Threads that torch may use in this process; a case that starts processes shares them out."""
    device: str = "cpu"
    """cpu or cuda; only cases registered for it are run."""

    @property
    def pairs(self) -> int:
        """Interleaved pairs to measure."""
        return 3 if self.quick else 21

    def compare(
        self,
        name: str,
        *,
        ours: Callable[[], object],
        peer: Callable[[], object],
        peer_name: str,
        target: Target | None = None,
        warmup: int = 2,
        note: str = "",
    ) -> Row:
        """Time two callables in interleaved pairs (each call is one sample) and return their row."""
        ours_s, peer_s = interleave(ours, peer, pairs=self.pairs, warmup=warmup)
        return Row(name, ours_s, peer_s, peer_name, target, note=note)


CaseFunction = Callable[[Bench], Iterable[Row]]
Plots = Callable[[Sequence[Row]], "Mapping[str, Figure]"]
"""Draws a case's rows: figures by the name that their files get."""


@dataclass(frozen=True)
class Case:
    """A registered case."""

    name: str
    title: str
    rows: CaseFunction
    devices: tuple[str, ...]
    plots: Plots | None = None


CASES: dict[str, Case] = {}


def case(
    name: str, title: str, devices: tuple[str, ...] = ("cpu",), plots: Plots | None = None
) -> Callable[[CaseFunction], CaseFunction]:
    """Register a generator of rows under `name`, the word that selects it on the command line."""

    def register(rows: CaseFunction) -> CaseFunction:
        if name in CASES:
            raise ValueError(f"two benchmark cases are called {name}")
        CASES[name] = Case(name, title, rows, devices, plots)
        return rows

    return register


def _meets(target: Target, value: float) -> bool:
    match target:
        case AtLeast(bound):
            return value >= bound
        case AtMost(bound):
            return value <= bound
        case Within(center, tolerance):
            return abs(value - center) <= tolerance

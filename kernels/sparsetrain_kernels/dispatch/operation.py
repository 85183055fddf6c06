"""An operation with several implementations, one of which runs a call: the fastest by measured times."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsetrain_kernels.dispatch.hardware import hardware_name
from sparsetrain_kernels.dispatch.table import DENSE, Choice, Problem, Table, load_table

_MAX_REMEMBERED = 4096


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation."""

    run: Callable[..., Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    suits: Callable[[Problem], bool] = lambda problem: True
    """Whether it can compute this problem at all."""


@dataclass(eq=False)
class Operation:
    """Implementations of one mathematical operation, which all take the same arguments and return the same tensors.

    A call says what the choice may depend on and passes the arguments on:

        FORWARD = Operation("scale", {"dense": Implementation(scale_dense), "fast": Implementation(scale_fast)})
        y = FORWARD.run(x, ("64x64", (tokens, dim), density), *arguments)
    """

    name: str
    implementations: Mapping[str, Implementation]
    """By name; "dense" must be among them: it takes what no other was measured to be faster at."""
    measured: Callable[[str], Iterable[Problem]] = lambda device: ()
    """Problems that tuning measures on a kind of device."""
    arguments: Callable[[Problem], Sequence[Any]] = lambda problem: ()
    """Random arguments of a problem, on its device, for tuning."""
    near: tuple[float, ...] = ()
    """log2 of the factor in each size within which a measured problem counts as near; (): two in any."""
    unmeasured: Callable[[Problem, Sequence[str]], tuple[str, str]] = lambda problem, candidates: (DENSE, "")
    """Of the candidates besides dense, or dense, what runs where nothing was measured near; and why, or ""."""
    _choices: dict[tuple[Any, ...], Choice] = field(init=False, default_factory=dict)
    _considered: dict[tuple[Any, ...], Choice] = field(init=False, default_factory=dict)
    _forced: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if DENSE not in self.implementations:
            raise ValueError(f"operation {self.name}: has no {DENSE!r} implementation; every operation needs one")
        if self.name in OPERATIONS:
            raise ValueError(f"two operations are called {self.name}")
        OPERATIONS[self.name] = self

    def run(self, like: torch.Tensor, problem: tuple[str, tuple[int, ...], float], *arguments: Any) -> Any:
        """Compute with the implementation chosen for this problem.

        Args:
            like: A tensor with the device and dtype of the computation.
            problem: Variant, sizes and density, as in `Problem`.
            arguments: What the implementations take.
        """
        if self._forced is not None:
            return self.implementations[self._forced].run(*arguments)
        device = like.device.type
        choice = self._choices.get((device, like.dtype, torch.get_num_threads(), problem))
        if choice is None:
            choice = self.choose(device, like.dtype, *problem)
        return self.implementations[choice.implementation].run(*arguments)

    def choose(self, device: str, dtype: torch.dtype, variant: str, sizes: tuple[int, ...], density: float) -> Choice:
        """What `run` does for this problem and why; `str()` of it is a sentence with both times.

        Args:
            device: cpu or cuda.
            dtype: Of the computation.
            variant: What else tells kernels apart.
            sizes: In the operation's own order.
            density: Share of the dense work that is left.
        """
        key = (device, dtype, torch.get_num_threads(), (variant, sizes, density))
        if key not in self._choices:
            self._choices[key] = self.would_choose(device, dtype, variant, sizes, density)
            _drop_oldest(self._choices)
        return self._choices[key]

    def would_choose(
        self, device: str, dtype: torch.dtype, variant: str, sizes: tuple[int, ...], density: float
    ) -> Choice:
        """As `choose`, of a problem that need not come up: `choices` does not tell of it."""
        key = (device, dtype, torch.get_num_threads(), (variant, sizes, density))
        if key not in self._considered:
            threads = torch.get_num_threads() if device == "cpu" else 1
            problem = Problem(self.name, variant, device, dtype, sizes, density, threads)
            candidates = self.candidates(problem)
            unmeasured = self.unmeasured(problem, candidates)
            self._considered[key] = table(device).choose(problem, candidates, self.near, unmeasured)
            _drop_oldest(self._considered)
        return self._considered[key]

    def candidates(self, problem: Problem) -> list[str]:
        """Implementations besides dense that can compute the problem here."""
        return [
            name
            for name, implementation in self.implementations.items()
            if name != DENSE and problem.device in implementation.devices and implementation.suits(problem)
        ]

    @contextmanager
    def force(self, implementation: str) -> Iterator[None]:
        """Inside, every call runs the named implementation, whatever was measured: for tests and measurements."""
        if implementation not in self.implementations:
            known = ", ".join(self.implementations)
            raise ValueError(f"{self.name} has no implementation {implementation!r}; choose one of {known}")
        before, self._forced = self._forced, implementation
        try:
            yield
        finally:
            self._forced = before


OPERATIONS: dict[str, Operation] = {}
_TABLES: dict[str, Table] = {}


def table(device: str) -> Table:
    """The measured times that choices on this kind of device are made from; read on first use."""
    if device not in _TABLES:
        if device not in ("cpu", "cuda"):
            return Table(device)
        _TABLES[device] = load_table(hardware_name(device), device)
    return _TABLES[device]


def use_table(device: str, new: Table | None) -> None:
    """Choose from this table from now on; None: read it again from where tables are kept."""
    if new is None:
        _TABLES.pop(device, None)
    else:
        _TABLES[device] = new
    forget_choices()


def explain(
    operation: str, device: str, dtype: torch.dtype, variant: str, sizes: tuple[int, ...], density: float
) -> str:
    """One sentence: which implementation a problem runs, and why, with its time and that of dense.

    Raises:
        ValueError: No operation has that name.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"no operation is called {operation!r}; there are {', '.join(sorted(OPERATIONS))}")
    return str(OPERATIONS[operation].choose(device, dtype, variant, sizes, density))


def choices() -> list[Choice]:
    """All choices that this process has made since `forget_choices`, by operation."""
    return [choice for _, operation in sorted(OPERATIONS.items()) for choice in operation._choices.values()]


def forget_choices() -> None:
    """Choose anew from now on, with the same results, so that `choices` tells what has been needed since."""
    for operation in OPERATIONS.values():
        operation._choices.clear()
        operation._considered.clear()


def _drop_oldest(choices: dict[tuple[Any, ...], Choice]) -> None:
    if len(choices) > _MAX_REMEMBERED:
        del choices[next(iter(choices))]

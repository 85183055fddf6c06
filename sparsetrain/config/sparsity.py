"""`sparsity`: which weights are zero, and when. A list of rules; the first that matches a weight owns it."""

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from sparsetrain.config.base import Int, KeyConflict, Section, kind_from_text, one_or_many

Fraction = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]
Sparsity = Annotated[float, Strict(), Field(ge=0.0, lt=1.0)]

_BLOCK = re.compile(r"^block\[\s*(\d+)\s*,\s*(\d+)\s*\]$")


@dataclass(frozen=True)
class BlockShape:
    """Weights live or die together in blocks of rows x cols; 1 x 1 is unstructured."""

    rows: int
    cols: int


class Uniform(Section):
    """Every weight matrix has the same sparsity."""

    kind: Literal["uniform"] = "uniform"


class ErdosRenyiKernel(Section):
    """Density in proportion to Σdims/Πdims: narrow matrices keep more (arXiv 1911.11134)."""

    kind: Literal["erk"]


class Global(Section):
    """One threshold over all weights that the rule owns."""

    kind: Literal["global"]
    floor: Fraction = 0.0
    """Share of each weight matrix that is kept whatever the threshold."""


Distribution = Annotated[
    Annotated[Uniform | ErdosRenyiKernel | Global, Field(discriminator="kind")], BeforeValidator(kind_from_text)
]


class _Window(Section):
    start: Fraction = 0.25
    """Where pruning begins, as a fraction of the phase's training compute."""
    end: Fraction = 0.75
    """Where pruning ends, as a fraction of the phase's training compute."""
    every_steps: Int = Field(default=100, gt=0)
    """Steps from one mask update to the next inside the window."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start >= self.end:
            raise KeyConflict("start", f"the window must begin before it ends, and end={self.end}")
        return self


class Constant(Section):
    """The target sparsity from the first step to the last."""

    kind: Literal["constant"] = "constant"


class Cubic(_Window):
    """s(u) = S + (s0 − S)(1 − u)³ over the window (Zhu & Gupta, arXiv 1710.01878)."""

    kind: Literal["cubic"]
    initial: Sparsity = 0.0
    """Sparsity s0 at the start of the window."""


class Geometric(_Window):
    """Each update keeps the same share of what is left: keep(k) = (1 − S)^((k+1)/n) (arXiv 2501.12486)."""

    kind: Literal["geometric"]


class Stepwise(Section):
    """Sparsities held from given fractions of training compute onwards."""

    kind: Literal["stepwise"]
    steps: tuple[tuple[Fraction, Sparsity], ...] = Field(min_length=1)
    """[fraction of compute, sparsity] pairs, both increasing."""

    @field_validator("steps")
    @classmethod
    def _increasing(cls, steps: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        for (at, level), (next_at, next_level) in itertools.pairwise(steps):
            if next_at <= at or next_level < level:
                raise ValueError(f"[{next_at}, {next_level}] must lie after and not below [{at}, {level}]")
        return steps


Schedule = Annotated[
    Annotated[Constant | Cubic | Geometric | Stepwise, Field(discriminator="kind")], BeforeValidator(kind_from_text)
]


class SparsityRule(Section):
    """The weights that some globs name, and how they become sparse."""

    params: Annotated[tuple[str, ...], BeforeValidator(one_or_many), Field(min_length=1)]
    """Globs over parameter names; `.weight` may be left out. Embeddings, norms, biases and the head are matched only by
    a glob whose last part spells them out."""
    method: Literal["static", "prune"]
    """static: one mask for the whole phase (SPDF, arXiv 2303.10464). prune: masks that only ever lose weights."""
    pattern: str = "unstructured"
    """unstructured | block[rows,cols]"""
    distribution: Distribution = Uniform()
    criterion: Literal["random", "magnitude"] | None = None
    """What decides which weights go; default random for static, magnitude for prune."""
    sparsity: Sparsity
    """Share of zeros at the end."""
    schedule: Schedule = Constant()

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        if pattern != "unstructured":
            match = _BLOCK.match(pattern)
            if match is None or "0" in match.groups():
                raise ValueError("expected unstructured or block[rows,cols], for example block[64,64]")
        return pattern

    @model_validator(mode="after")
    def _method_fits_schedule(self) -> Self:
        constant = isinstance(self.schedule, Constant)
        if self.method == "static" and not constant:
            kind = self.schedule.kind
            raise KeyConflict("schedule", f"method=static has one mask from start to end; {kind} needs method=prune")
        if self.method == "prune" and constant:
            raise KeyConflict("schedule", "method=prune needs one of: cubic, geometric, stepwise")
        if isinstance(self.schedule, Cubic) and self.schedule.initial > self.sparsity:
            raise KeyConflict("schedule.initial", f"must not be above sparsity={self.sparsity}")
        if isinstance(self.schedule, Stepwise) and self.schedule.steps[-1][1] != self.sparsity:
            last = self.schedule.steps[-1][1]
            raise KeyConflict("sparsity", f"schedule.steps ends at {last}; make the two equal")
        if isinstance(self.distribution, Global) and self.distribution.floor > 1 - self.sparsity + 1e-9:
            left = f"sparsity={self.sparsity} leaves {1 - self.sparsity:.4g} of the weights"
            raise KeyConflict("distribution.floor", f"{left}, and every one of them keeps more; lower the floor")
        return self

    @property
    def block(self) -> BlockShape:
        """The unit in which weights are kept or zeroed."""
        match = _BLOCK.match(self.pattern)
        return BlockShape(int(match.group(1)), int(match.group(2))) if match else BlockShape(1, 1)

    @property
    def scored_by(self) -> Literal["random", "magnitude"]:
        """The criterion, with the method's default filled in."""
        return self.criterion or ("random" if self.method == "static" else "magnitude")

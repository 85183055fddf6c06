"""`sparsity`: which weights are zero, and when. A list of rules; the first that matches a weight owns it."""

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from sparsetrain.config.base import Int, KeyConflict, Section, kind_from_text, one_or_many

Fraction = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]
Sparsity = Annotated[float, Strict(), Field(ge=0.0, lt=1.0)]

_BLOCK = re.compile(r"^block\[\s*(\d+)\s*,\s*(\d+)\s*\]$")
_GROUPS = re.compile(r"^(?:(vector)(?:\[(\d+)\])? +)?(\d+):(\d+)$")
MAX_GROUP = 64
DEFAULT_VECTOR = 64

Method = Literal["static", "prune", "ste", "sr_ste", "mdgf", "sdgf", "bdwp", "transposable"]
RECIPES: tuple[str, ...] = get_args(Method)[2:]
"""Methods that train dense weights whose forward pass sees n of every m of them."""

_BELONGS_TO = {
    "refresh_every_steps": RECIPES,
    "mask_decay": ("sr_ste", "transposable"),
    "decay": ("mdgf",),
    "decay_end": ("mdgf", "sdgf"),
    "dense_tail": ("transposable",),
}
"""Keys that only some methods read."""


@dataclass(frozen=True)
class BlockShape:
    """Weights live or die together in blocks of rows x cols; 1 x 1 is unstructured."""

    rows: int
    cols: int


@dataclass(frozen=True)
class GroupShape:
    """n of every m consecutive inputs are kept, by `vector` neighbouring outputs together."""

    n: int
    m: int
    vector: int = 1


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
    method: Method
    """static: one mask for the whole phase (SPDF, arXiv 2303.10464). prune: masks that only ever lose weights. The
    others train dense weights of which the forward pass sees n of every m. ste: straight through. sr_ste: and unseen
    weights decay (2102.04010). mdgf, sdgf: the unseen fade out, or n falls (2402.04744). bdwp: n:m in the input
    gradient too, along the outputs (2309.13015). transposable: 2:4 both ways, dense at the end (2404.01847)."""
    pattern: str = "unstructured"
    """unstructured | block[rows,cols] | n:m: n of every m inputs of each output | vector n:m or vector[outputs] n:m:
    the same inputs for 64, or so many, outputs side by side. Zeros are skipped wherever a kernel was measured to be
    faster than dense: on a CPU those of blocks and vectors, on a GPU those of 2:4 too."""
    distribution: Distribution = Uniform()
    criterion: Literal["random", "magnitude"] | None = None
    """What decides which weights go; default random for static, magnitude for prune."""
    sparsity: Sparsity
    """Share of zeros at the end; may be left out where the pattern is n:m, which says it."""
    schedule: Schedule = Constant()
    refresh_every_steps: Int | None = Field(default=None, gt=0)
    """n:m methods: steps from one choice of masks to the next; default 1, for transposable 40."""
    mask_decay: Annotated[float, Strict(), Field(ge=0.0, lt=1.0)] | None = None
    """sr_ste, transposable: λ of λ(1−M)⊙W, which is added to the gradient; default 2e-4, for transposable 6e-5."""
    decay: Literal["linear", "exponential"] | None = None
    """mdgf: how the factor d of unseen weights falls from 1; default linear."""
    decay_end: Annotated[float, Strict(), Field(gt=0.0, le=1.0)] | None = None
    """mdgf, sdgf: fraction of the phase's steps from which the pattern itself holds; default .75 for mdgf, and for sdgf
    what makes all its stages equally long."""
    dense_tail: Sparsity | None = None
    """transposable: last fraction of the phase's steps that is dense; default a sixth."""

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, data: Any) -> Any:
        pattern = data.get("pattern") if isinstance(data, dict) and "sparsity" not in data else None
        if not isinstance(pattern, str) or _GROUPS.match(pattern) is None:
            return data
        groups = _groups(pattern)  # None: the pattern is wrong, and that alone is told
        return {**data, "sparsity": 1 - groups.n / groups.m if groups else 0.0}

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        if (found := _GROUPS.match(pattern)) and _groups(pattern) is None:
            _, outputs, n, m = found.groups()
            raise ValueError(
                f"n:m keeps n={n} of every m={m} weights: choose 1 <= n < m <= {MAX_GROUP}, for example 2:4 or 1:8"
                + (f", and at least one output, not vector[{outputs}]" if outputs else "")
            )
        if pattern != "unstructured" and found is None:
            match = _BLOCK.match(pattern)
            if match is None or "0" in match.groups():
                raise ValueError(
                    "expected unstructured, block[rows,cols], n:m or vector n:m, for example block[64,64], 2:4 or "
                    "vector 1:4"
                )
        return pattern

    @model_validator(mode="after")
    def _method_fits_pattern(self) -> Self:
        recipe, groups = self.method in RECIPES, self.groups
        if recipe and groups is None:
            raise KeyConflict("pattern", f"method={self.method} needs n:m, for example 2:4, not {self.pattern}")
        if self.method == "bdwp" and groups is not None and groups.vector > 1:
            raise KeyConflict("pattern", f"method={self.method} takes n:m without vectors, not {self.pattern}")
        if self.method == "prune" and groups is not None:
            raise KeyConflict(
                "pattern", f"{self.pattern} is one sparsity, with no way there; use static or {', '.join(RECIPES)}"
            )
        if groups is not None and not isinstance(self.distribution, Uniform):
            raise KeyConflict("distribution", f"pattern={self.pattern} is equal in all weights; remove it")
        if self.method == "transposable" and self.pattern != "2:4":
            raise KeyConflict("pattern", f"method=transposable has masks for 2:4 alone, not for {self.pattern}")
        if groups is not None and abs(self.sparsity - (1 - groups.n / groups.m)) > 1e-6:
            raise KeyConflict(
                "sparsity", f"pattern={self.pattern} makes it {1 - groups.n / groups.m:.6g}; leave sparsity out"
            )
        for key, methods in _BELONGS_TO.items():
            if getattr(self, key) is not None and self.method not in methods:
                raise KeyConflict(key, f"only for method={' or '.join(methods)}, not {self.method}; remove it")
        if self.method == "bdwp" and self.refreshed_every > 1:
            raise KeyConflict("refresh_every_steps", "method=bdwp chooses its masks anew after every step; remove it")
        return self

    @model_validator(mode="after")
    def _recipe_has_its_own_schedule(self) -> Self:
        if self.method in RECIPES:
            if not isinstance(self.schedule, Constant):
                raise KeyConflict("schedule", f"method={self.method} has a schedule of its own; remove it")
            if self.criterion == "random":
                raise KeyConflict("criterion", f"method={self.method} keeps the largest magnitudes; remove it")
        return self

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
    def groups(self) -> GroupShape | None:
        """n:m, of vectors or not; None for any other pattern."""
        return _groups(self.pattern)

    @property
    def is_recipe(self) -> bool:
        """Whether weights stay dense and only the forward pass sees fewer."""
        return self.method in RECIPES

    @property
    def refreshed_every(self) -> int:
        """Steps from one choice of n:m masks to the next, with the method's default filled in."""
        return self.refresh_every_steps or (40 if self.method == "transposable" else 1)

    @property
    def decayed_by(self) -> float:
        """λ of the decay of unseen weights, with the method's default filled in."""
        default = {"sr_ste": 2e-4, "transposable": 6e-5}.get(self.method, 0.0)
        return default if self.mask_decay is None else self.mask_decay

    @property
    def scored_by(self) -> Literal["random", "magnitude"]:
        """The criterion, with the method's default filled in."""
        return self.criterion or ("random" if self.method == "static" else "magnitude")


def _groups(pattern: Any) -> GroupShape | None:
    """The n:m that a text says, if it can be."""
    match = _GROUPS.match(pattern) if isinstance(pattern, str) else None
    if match is None:
        return None
    vector = int(match[2] or DEFAULT_VECTOR) if match[1] else 1
    n, m = int(match[3]), int(match[4])
    return GroupShape(n, m, vector) if 1 <= n < m <= MAX_GROUP and vector >= 1 else None

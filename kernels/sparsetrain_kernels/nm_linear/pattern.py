"""`NMPattern`: n of every m consecutive inputs are kept, by each output alone or by a group of outputs together."""

import re
from dataclasses import dataclass

MAX_M = 64
DEFAULT_VECTOR = 64


@dataclass(frozen=True)
class NMPattern:
    """n:m sparsity along the inputs of a weight [outputs, inputs].

    Raises:
        ValueError: Not 1 <= n <= m <= 64, or vector is below 1.
    """

    n: int
    """Inputs that are kept of every m."""
    m: int
    vector: int = 1
    """Neighbouring outputs that keep the same inputs; from 64 on, gathered inputs feed dense products."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= MAX_M:
            raise ValueError(f"pattern {self.n}:{self.m}: n must be at least 1 and at most m, and m at most {MAX_M}")
        if self.vector < 1:
            raise ValueError(f"vector={self.vector}: must be at least 1 output")

    @classmethod
    def parse(cls, text: str) -> "NMPattern":
        """The pattern of "2:4", "vector 1:4" (64 outputs together) or "vector[128] 1:4".

        Raises:
            ValueError: The text has another form, or names a pattern that cannot be.
        """
        found = re.fullmatch(r"(?:(vector)(?:\[(\d+)\])? +)?(\d+):(\d+)", text.strip())
        if found is None:
            raise ValueError(f"pattern {text!r}: write n:m such as 2:4, or vector n:m, or vector[outputs] n:m")
        vector = int(found[2] or DEFAULT_VECTOR) if found[1] else 1
        return cls(int(found[3]), int(found[4]), vector)

    def check(self, num_outputs: int, num_inputs: int) -> None:
        """Compare with the shape of a weight.

        Raises:
            ValueError: m does not divide the inputs, or vector the outputs.
        """
        if num_inputs % self.m:
            raise ValueError(f"pattern {self}: m={self.m} does not divide the {num_inputs} inputs of the weight")
        if num_outputs % self.vector:
            raise ValueError(
                f"pattern {self}: vector={self.vector} does not divide the {num_outputs} outputs of the weight"
            )

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.vector == 1 else f"vector[{self.vector}] {self.n}:{self.m}"

"""How far a run has come: everything small that a checkpoint must hold beside tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass
class PhaseTotals:
    """What a phase has added up so far; the sums behind its figures in summary.json."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    train_flops: float = 0.0
    executed_flops: float = 0.0
    model_flops: float = 0.0
    """Executed FLOPs without the recomputation of activations: the numerator of MFU."""
    dense_train_flops: float = 0.0
    attention_flops_saved: float = 0.0
    """FLOPs that dense attention would have taken on top."""
    nonzero_steps: float = 0.0
    """Sum over steps of the non-zero parameters in linear layers."""
    density: float = 1.0
    layer_density: dict[str, float] = field(default_factory=dict)
    """Of each weight that a rule owns, by name."""
    sparse_layers: list[dict[str, Any]] = field(default_factory=list)
    """`SparseLayerSummary`s in plain values."""
    eval_before: float | None = None
    """Held-out bits per byte before the first step."""
    eval_after: float | None = None


@dataclass
class RunState:
    """Position in the run, and its sums."""

    step: int = 0
    """Optimizer steps over all phases."""
    phase: int = 0
    """Index of the current phase; the number of phases when all are done."""
    phase_step: int = 0
    bad_steps: int = 0
    final_loss: float | None = None
    eval_loss: float | None = None
    resumed: bool = False
    totals: list[PhaseTotals] = field(default_factory=list)

    @classmethod
    def fresh(cls, num_phases: int) -> Self:
        """The state before the first step."""
        return cls(totals=[PhaseTotals() for _ in range(num_phases)])

    @property
    def current(self) -> PhaseTotals:
        """The current phase's sums."""
        return self.totals[self.phase]

    @property
    def tokens(self) -> int:
        """Tokens trained on, over all phases."""
        return sum(totals.tokens for totals in self.totals)

    def next_phase(self) -> None:
        """Move on to the first step of the next phase."""
        self.phase, self.phase_step = self.phase + 1, 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The state that `to_dict` described."""
        totals = [PhaseTotals(**phase) for phase in values["totals"]]
        return cls(**{**values, "totals": totals})

"""What a run tells whoever is watching: small frozen records that cross process borders.

The loop emits them on rank 0; a progress display, or an actor that forwards them to the driver, receives them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsetrain.training.perplexity import perplexity


@dataclass(frozen=True)
class RunStarted:
    """The model is built and training is about to begin or to resume."""

    name: str
    folder: str
    num_parameters: int
    total_tokens: int
    world_size: int
    device: str
    matmul_peak_flops: float
    """Measured matmul peak of all ranks together in FLOP/s, the denominator of MFU."""
    resumed_from_step: int | None = None
    active_parameters: int | None = None
    """Parameters that a token uses, where it does not use all."""


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins, or goes on after a restart."""

    name: str
    index: int
    num_phases: int
    first_step: int
    """Step of the run, counted over all phases, at which the phase begins."""
    num_steps: int
    num_tokens: int
    summary: str
    """One line for people: data, sparsity, and what became of the optimizer state and learning rate."""


@dataclass(frozen=True)
class StepDone:
    """One optimizer step; `row` is the line of metrics.jsonl."""

    phase: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class EvalDone:
    """A held-out evaluation."""

    phase: str
    step: int
    when: Literal["start", "during", "end"]
    loss: float
    """Nats a token."""
    bits_per_byte: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """e^loss, a token."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete and durable."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class Notice:
    """Something a person should know; shown once."""

    message: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class DataProgress:
    """Token shards are being built: so many bytes of this stage are done."""

    stage: str
    done: int
    total: int | None
    """None where nobody knows beforehand."""


@dataclass(frozen=True)
class RunFinished:
    """The run is over; `summary` is what summary.json holds."""

    summary: Mapping[str, Any] = field(default_factory=dict)


Event = RunStarted | PhaseStarted | StepDone | EvalDone | CheckpointSaved | Notice | DataProgress | RunFinished
Reporter = Callable[[Event], None]

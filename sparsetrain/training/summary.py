"""summary.json: what a run came to."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from sparsetrain.errors import RunFolderError
from sparsetrain.training.metrics import finite_or_null, replace_file

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class SparseLayerSummary:
    """Linear layers that are alike, and whose rule keeps zeros in a pattern that kernels can leave out."""

    weights: str
    """Their weights, * for the number of the layer."""
    count: int
    shape: tuple[int, int]
    """Outputs and inputs of each."""
    pattern: str
    density: float
    implementation: str
    """What the dispatcher chose for their output, gradient of the input and gradient of the weight: once where it is
    the same for all three."""
    dense_seconds: float | None
    """Of the three products of one layer (of a rank's part of it) and one micro-batch with dense kernels, by the times
    that the choice was made from; None where nothing comparable was measured on this hardware."""
    sparse_seconds: float | None
    """The same for what was chosen."""
    flops_skipped: float
    """Share of their dense FLOPs that the kernels leave out."""


@dataclass(frozen=True)
class PhaseSummary:
    """What one phase came to; figures mean what they mean in RunSummary, over this phase alone."""

    name: str
    tokens: int
    steps: int
    seconds: float
    """Wall time of the phase's optimizer steps, without evaluations and checkpoints."""
    eval_before: float | None
    """Held-out bits per byte of the phase's own data before its first step; None without held-out text."""
    eval_after: float | None
    """The same after its last step."""
    density: float
    """Density after the phase's last step."""
    train_flops: float
    executed_flops: float
    dense_train_flops: float
    layer_density: Mapping[str, float] = field(default_factory=dict)
    """Density of each weight that a rule owns, by name, after the phase's last step."""
    sparse_layers: tuple[SparseLayerSummary, ...] = ()
    """How the layers ran in whose pattern kernels can leave out zeros."""


@dataclass(frozen=True)
class ExpertSummary:
    """What the experts of a run had to do, means over its steps; figures mean what they mean in metrics.jsonl."""

    expert_imbalance: float
    device_imbalance: float
    replicas: float
    moved_bytes: float
    dropped_tokens: int
    """Of all steps together."""


@dataclass(frozen=True)
class RunSummary:
    """What a run came to, over all its phases.

    Nominal figures are arithmetic on paper; executed and measured ones are what happened on the machine. With masks on
    dense kernels the zeros are multiplied like any other weight, so the FLOPs saved are nominal only.
    """

    final_loss: float | None
    """Training loss of the last step, nats a token; None if it was not finite."""
    eval_loss: float | None
    """Last held-out loss, nats a token; None without held-out text."""
    eval_bits_per_byte: float | None
    """Last held-out loss in bits per UTF-8 byte of text, which no tokenizer changes; None without held-out text."""
    tokens: int
    """Tokens trained on."""
    tokens_per_s: float
    """Tokens of all ranks over the seconds their steps took, evaluations and checkpoints left out."""
    mfu: float
    """Executed model FLOPs per second of those steps over the measured matmul peak of that dtype, all ranks."""
    density: float
    """Non-zeros over all weights that sparsity rules own, after the last step; 1 where no rule owns any."""
    n_avg: float
    """Mean over steps of the non-zero parameters in linear layers, all phases (arXiv 2501.12486)."""
    train_flops: float
    """Nominal training FLOPs, forward and backward, zeros not counted."""
    executed_flops: float
    """FLOPs that the kernels really multiplied."""
    dense_train_flops: float
    """FLOPs of the same tokens through the same model without zeros; sparse attention is the same in it."""
    phases: tuple[PhaseSummary, ...]
    seconds: float = 0.0
    """Wall time of the optimizer steps, evaluations and checkpoints left out."""
    seconds_saved: float | None = None
    """Measured by StepTimes.compare, but 0 where the kernels multiply zeros like other weights, because the clock's
    noise is no saving; None where the run has no dense steps, or no sparse ones, to compare."""
    sample: str | None = None
    """Text that the trained model wrote."""
    bad_steps: int = 0
    """Steps skipped because loss or gradient was not finite."""
    resumed: bool = False
    """Whether any part of the run went on from a checkpoint."""
    parameters: int | None = None
    """Of the model, zeros included; None in summaries of earlier versions."""
    active_parameters: int | None = None
    """Those that a token uses: of E experts, top_k."""
    experts: ExpertSummary | None = None
    """None for a model without experts."""
    attention_flops_saved: float = 0.0
    """FLOPs, forward and backward, of the keys that block-sparse attention hides; no other figure counts them."""

    @property
    def multiplied_zeros(self) -> bool:
        """Whether the kernels did the work of a dense run, whatever the masks."""
        return did_dense_work(self.executed_flops, self.dense_train_flops)

    @property
    def flops_saved(self) -> float:
        """Share of the dense training FLOPs that the zeros save, nominally."""
        return 1.0 - self.train_flops / self.dense_train_flops if self.dense_train_flops else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object that summary.json holds, without NaN or infinities."""
        summary: dict[str, Any] = finite_or_null(asdict(self))
        return summary

    @classmethod
    def from_json(cls, summary: Mapping[str, Any]) -> Self:
        """Read what to_json wrote.

        Raises:
            RunFolderError: A figure is missing or of the wrong type; the message names each.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(summary))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise RunFolderError(f"{SUMMARY_FILE}: {problems}; it was written by another version or changed") from None

    def save(self, folder: Path) -> None:
        """Write summary.json into a run folder, whole or not at all.

        Raises:
            RunFolderError: The folder is not writable or its disk is full.
        """
        path = Path(folder) / SUMMARY_FILE
        try:
            replace_file(path, (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise RunFolderError(f"{path}: {error.strerror or error}; free space or make it writable") from error

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run folder's summary.json.

        Raises:
            RunFolderError: There is none, because the run has not finished, or it cannot be read.
        """
        path = Path(folder) / SUMMARY_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunFolderError(f"{path}: not there; the run has not finished, go on with --resume") from None
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path}: cannot be read ({error})") from None
        if not isinstance(content, dict):
            raise RunFolderError(f"{path}: expected an object, found {type(content).__name__}")
        return cls.from_json(content)


@dataclass(frozen=True)
class StepTimes:
    """Dense against sparse steps of one run: what its zeros really saved on its machine."""

    dense_s: float
    """Median seconds of a dense step."""
    sparse_s: float
    """Median seconds of a step with zeros in the weights."""
    seconds_saved: float
    """What the sparse steps would have taken at the dense median, less what they took: mask updates count as cost."""

    @classmethod
    def compare(cls, rows: Sequence[Mapping[str, Any]]) -> "StepTimes | None":
        """Compare the steps that have the most frequent batch size; the first, which warms things up, is left out.

        Args:
            rows: Rows of metrics.jsonl with tokens, density and step_time_s.

        Returns:
            None where there are no dense or no sparse steps of equal batch to compare.
        """
        timed = [
            (later["tokens"] - earlier["tokens"], later["density"], later["step_time_s"])
            for earlier, later in itertools.pairwise(rows)
            if later.get("step_time_s") is not None and later.get("density") is not None
        ]
        if not timed:
            return None
        batch = statistics.mode(tokens for tokens, _, _ in timed)
        dense = [seconds for tokens, density, seconds in timed if tokens == batch and density >= 1.0]
        sparse = [seconds for tokens, density, seconds in timed if tokens == batch and density < 1.0]
        if not dense or not sparse:
            return None
        usual = statistics.median(dense)
        return cls(usual, statistics.median(sparse), len(sparse) * usual - sum(sparse))


def did_dense_work(executed_flops: float, dense_train_flops: float) -> bool:
    """Whether zeros were multiplied like other weights; a thousandth is left to rounding."""
    return executed_flops >= 0.999 * dense_train_flops


def measured_seconds_saved(times: StepTimes | None, *, executed_flops: float, dense_train_flops: float) -> float | None:
    """The seconds that a run's zeros saved: RunSummary.seconds_saved."""
    if did_dense_work(executed_flops, dense_train_flops):
        return 0.0
    return times.seconds_saved if times is not None else None

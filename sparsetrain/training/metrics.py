"""What a run measures: a row a step in metrics.jsonl, a row an evaluation in evals.jsonl, and both in TensorBoard.

A row of metrics.jsonl, for the optimizer step that it names:
    step            optimizer steps so far, over all phases, this one included
    phase           name of the phase
    tokens          training tokens so far, over all phases, this step included
    loss            mean training loss of the step's tokens, nats a token
    lr              learning rate of this step
    grad_norm       global L2 norm of the gradient, before clipping
    tokens_per_s    tokens of all ranks over the seconds they took, recent steps, without evaluations and checkpoints
    mfu             executed model FLOPs per second over the measured matmul peak of that dtype, recent steps
    density         non-zeros over all weights that sparsity rules own; 1 where no rule owns any
and what else applies (`step_time_s`, `bad_steps`, ...). Of a model with experts:
    aux_loss            what balance and router losses add to the loss, already weighted
    expert_imbalance    load of the fullest expert over the mean, in the layer where that is largest
    device_imbalance    rows of the fullest rank of an expert group over the mean, a mean over layers
    replicas            copies of experts besides their owners' in the next step, all layers and ranks of a group
    moved_bytes         bytes of experts (weights, gradients, optimizer state) that came to a rank, all ranks
    dropped_tokens      assignments that exceeded the capacity of an expert
    pipeline_degree     chunks in which tokens travel in the next step
A row of evals.jsonl: step, phase, when (start, during or end of the phase), loss (nats a token), perplexity,
bits_per_byte, tokens (held-out ones evaluated). Both files are strict JSON: what is not finite is null.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from sparsetrain.errors import RunFolderError
from sparsetrain.training.event_file import EventFile
from sparsetrain.training.events import EvalDone

METRICS_FILE = "metrics.jsonl"
EVALS_FILE = "evals.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Row = dict[str, Any]


class MetricsWriter:
    """Appends what a run measures to its folder; every row is handed to the operating system before the next step.

    Args:
        folder: The run folder, which exists.
        resume_step: Last step of the checkpoint that the run resumes from; later rows are removed, here and in
            TensorBoard. None: the run starts from nothing, and so do the files.

    Raises:
        RunFolderError: The folder is not writable, its disk is full, or a file in it is damaged.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self.folder = Path(folder)
        truncate_metrics(self.folder, resume_step)
        self._known_evals = {_eval_key(row) for row in read_evals(self.folder)}
        with _errors_name(self.folder):
            self._metrics = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
            self._evals = (self.folder / EVALS_FILE).open("a", encoding="utf-8")
            self._tensorboard = EventFile(self.folder / TENSORBOARD_FOLDER, first_step=(resume_step or 0) + 1)

    def step(self, row: Mapping[str, Any]) -> None:
        """Append the row of one optimizer step.

        Raises:
            RunFolderError: The disk is full or the folder has become unwritable.
        """
        self._append(self._metrics, row)
        scalars = {f"train/{key}": value for key, value in row.items() if key != "step"}
        with _errors_name(self.folder):
            self._tensorboard.add(int(row["step"]), scalars)

    def evaluation(self, event: EvalDone) -> None:
        """Append the row of one held-out evaluation; one that a resumed run repeats is already there and left alone.

        Raises:
            RunFolderError: The disk is full or the folder has become unwritable.
        """
        row = {
            "step": event.step,
            "phase": event.phase,
            "when": event.when,
            "loss": event.loss,
            "perplexity": event.perplexity,
            "bits_per_byte": event.bits_per_byte,
            "tokens": event.num_tokens,
        }
        if _eval_key(row) in self._known_evals:
            return
        self._known_evals.add(_eval_key(row))
        self._append(self._evals, row)
        scalars = {f"eval/{event.phase}/{key}": row[key] for key in ("loss", "perplexity", "bits_per_byte")}
        with _errors_name(self.folder):
            self._tensorboard.add(event.step, scalars)

    def close(self) -> None:
        """Flush and close the files; harmless a second time."""
        with _errors_name(self.folder):
            for file in (self._metrics, self._evals, self._tensorboard):
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, file: IO[str], row: Mapping[str, Any]) -> None:
        with _errors_name(self.folder):
            file.write(json.dumps(finite_or_null(row), allow_nan=False) + "\n")
            file.flush()


def read_metrics(folder: Path) -> list[Row]:
    """Read metrics.jsonl, oldest row first; a last line that is still being written is left out.

    Returns:
        The rows as written, null being None; empty where the run has not begun.

    Raises:
        RunFolderError: A line cannot be read.
    """
    path = Path(folder) / METRICS_FILE
    return _parse(path, _read(path))


def read_evals(folder: Path) -> list[Row]:
    """Read evals.jsonl; like read_metrics."""
    path = Path(folder) / EVALS_FILE
    return _parse(path, _read(path))


def truncate_metrics(folder: Path, step: int | None) -> None:
    """Remove the rows of steps after `step`, all rows if it is None, so that a resumed run writes each step once.

    Files that need no change are not touched; others are replaced whole, so that a crash leaves the old or the new.

    Raises:
        RunFolderError: A file is damaged or cannot be written.
    """
    for name in (METRICS_FILE, EVALS_FILE):
        path = Path(folder) / name
        text = _read(path)
        lines = text.split("\n")[:-1]  # without a torn last line
        rows = _parse(path, text)
        kept = "".join(
            f"{line}\n" for line, row in zip(lines, rows, strict=True) if step is not None and row["step"] <= step
        )
        if kept != text:
            with _errors_name(path):
                replace_file(path, kept.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of a file, durably; a crash or a full disk leaves what was there.

    Raises:
        OSError: The content cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite_or_null(value: Any) -> Any:
    """Turn NaN and infinities, also inside mappings and sequences, into None: JSON knows no such numbers."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def _read(path: Path) -> str:
    with _errors_name(path):
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _parse(path: Path, text: str) -> list[Row]:
    # Every complete line ends in a newline; what follows the last one was cut short by a crash or is being written.
    return [_parse_row(path, number, line) for number, line in enumerate(text.split("\n")[:-1], start=1)]


def _parse_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}:{number}: not JSON ({error}); the line is damaged, remove it") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise RunFolderError(f"{path}:{number}: expected an object with a step, found {line[:60]!r}; remove the line")
    return row


def _eval_key(row: Row) -> tuple[Any, ...]:
    return (row["step"], row["phase"], row["when"])


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn what the operating system says into a message with the path and the fix."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: {error.strerror or error}. Free space on that disk or make the run folder writable, then go on "
            "with --resume"
        ) from error


class Throughput:
    """Tokens and FLOPs per second of training itself: recent steps, with evaluations and checkpoints left out.

    Call `step_done` at the end of every optimizer step, and do what is not training inside `with meter.paused():`.

    Args:
        window: Steps over which the recent rates are taken.
        clock: Seconds from any origin.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=window)
        self._step_began = clock()
        self.total_tokens = 0
        self.total_executed_flops = 0.0
        self.total_seconds = 0.0

    def step_done(self, tokens: int, executed_flops: float = 0.0) -> float:
        """Count a step of all ranks' `tokens` and `executed_flops`; returns the seconds it took, pauses left out."""
        now = self._clock()
        seconds, self._step_began = now - self._step_began, now
        self._recent.append((seconds, tokens, executed_flops))
        self.total_tokens += tokens
        self.total_executed_flops += executed_flops
        self.total_seconds += seconds
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of every figure."""
        began = self._clock()
        try:
            yield
        finally:
            self._step_began += self._clock() - began

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over the recent steps; 0 before the first."""
        return _rate(sum(tokens for _, tokens, _ in self._recent), self._recent_seconds)

    @property
    def executed_flops_per_s(self) -> float:
        """FLOP/s over the recent steps; 0 before the first."""
        return _rate(sum(flops for _, _, flops in self._recent), self._recent_seconds)

    @property
    def mean_tokens_per_s(self) -> float:
        """Tokens per second over all steps counted here, the first and its compilation included."""
        return _rate(self.total_tokens, self.total_seconds)

    @property
    def _recent_seconds(self) -> float:
        return sum(seconds for seconds, _, _ in self._recent)


def mfu(executed_flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: executed model FLOPs per second over the measured matmul peak (PaLM, arXiv 2204.02311).

    Args:
        executed_flops: FLOPs of the model that the kernels really multiplied, forward and backward, all ranks.
        seconds: Time they took.
        peak: Measured matmul peak of all ranks together for the dtype they ran in, FLOP/s.
    """
    return _rate(executed_flops, seconds * peak)


def _rate(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0

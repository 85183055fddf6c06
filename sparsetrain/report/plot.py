"""loss.png: the losses of a run over its tokens, with its phases and the density of its weights."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config.units import format_count
from sparsetrain.errors import RunFolderError
from sparsetrain.report.style import GRID, INK, QUIET, SHADE
from sparsetrain.training.metrics import Row, read_evals, read_metrics, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PLOT_FILE = "loss.png"

# Okabe and Ito's colours, which stay apart in every kind of colour blindness; each has another line or mark, too.
_TRAIN, _HELD_OUT, _DENSITY = "#0072B2", "#D55E00", "#009E73"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Phase:
    """A phase as arrays over its steps, and over its held-out evaluations; tokens count from the run's first."""

    name: str
    begin: float
    tokens: Floats
    loss: Floats
    density: Floats
    eval_tokens: Floats
    eval_loss: Floats
    bits_per_byte: Floats


@dataclass(frozen=True)
class _Run:
    name: str
    phases: tuple[_Phase, ...]

    @property
    def num_steps(self) -> int:
        return sum(len(phase.tokens) for phase in self.phases)


def plot_loss(folder: Path) -> Path:
    """Draw a run's loss.png from its metrics.jsonl and evals.jsonl, whether it has finished or not.

    Returns:
        The picture's path.

    Raises:
        RunFolderError: The run has no step yet, a row is damaged, or the picture cannot be written.
    """
    folder = Path(folder)
    path = folder / PLOT_FILE
    image = io.BytesIO()
    _draw(_read(folder)).savefig(image, format="png")
    try:
        replace_file(path, image.getvalue())
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror or error}; free space or make the folder writable") from error
    return path


def smooth(values: Floats, window: int) -> Floats:
    """Centred moving average over up to `window` values, fewer near the ends; values that are not finite are left out.

    Centred, because an average of the past alone lags behind a falling loss; narrower at the beginning, where the loss
    falls fastest.
    """
    index = np.arange(len(values))
    half = np.minimum(index // 8, window // 2)
    first, last = index - half, np.minimum(index + half, len(values) - 1)
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    count = counts[last + 1] - counts[first]
    mean: Floats = np.where(count > 0, (sums[last + 1] - sums[first]) / np.maximum(count, 1), np.nan)
    return mean


def _read(folder: Path) -> _Run:
    rows, evals = read_metrics(folder), read_evals(folder)
    if not rows:
        raise RunFolderError(f"{folder / 'metrics.jsonl'}: no step yet, so there is nothing to draw")
    at_step = {0: 0.0, **{row["step"]: float(row["tokens"]) for row in rows}}
    phases = []
    begin = 0.0
    for name, members in groupby(rows, key=lambda row: str(row.get("phase", ""))):
        steps = list(members)
        held_out = [row for row in evals if row["phase"] == name and row["step"] in at_step]
        phases.append(
            _Phase(
                name,
                begin,
                _column(steps, "tokens"),
                _column(steps, "loss"),
                _column(steps, "density"),
                np.array([at_step[row["step"]] for row in held_out]),
                _column(held_out, "loss"),
                _column(held_out, "bits_per_byte"),
            )
        )
        begin = at_step[steps[-1]["step"]]
    return _Run(folder.resolve().name, tuple(phases))


def _column(rows: Sequence[Row], key: str) -> Floats:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _draw(run: _Run) -> "Figure":
    # matplotlib takes most of a second to import, and pyplot would keep state that is not ours.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.1), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, phase in enumerate(run.phases):
        _draw_phase(axes, phase, run, is_first=index == 0, is_shaded=index % 2 == 1)
    _style(axes, run)
    density = _draw_density(axes, run)
    figure.suptitle(run.name, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        [*handles, *density], [*labels, *("density" for _ in density)],
        loc="upper right", ncols=3, frameon=False, labelcolor=INK, fontsize=10,
    )  # fmt: skip
    return figure


def _draw_phase(axes: "Axes", phase: _Phase, run: _Run, *, is_first: bool, is_shaded: bool) -> None:
    end = phase.tokens[-1]
    if is_shaded:
        axes.axvspan(phase.begin, end, color=SHADE, zorder=0, linewidth=0)
    if not is_first:
        axes.axvline(phase.begin, color=QUIET, linewidth=0.8, zorder=1)
    if len(run.phases) > 1:
        axes.annotate(
            phase.name, ((phase.begin + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", va="bottom", color=QUIET, fontsize=9,
        )  # fmt: skip
    window = run.num_steps // 40
    if window > 1:
        axes.plot(phase.tokens, phase.loss, color=_TRAIN, alpha=0.25, linewidth=0.7, zorder=2)
    axes.plot(
        phase.tokens, smooth(phase.loss, window), color=_TRAIN, linewidth=1.8, zorder=3, clip_on=False,
        marker="s" if len(phase.tokens) == 1 else None, label="training" if is_first else "",
    )  # fmt: skip
    axes.plot(
        phase.eval_tokens, phase.eval_loss, color=_HELD_OUT, linestyle=":", linewidth=1.0, marker="o",
        markersize=5 if len(phase.eval_tokens) < 30 else 3, markeredgecolor="white", markeredgewidth=0.7,
        label="held out" if is_first else "", zorder=4, clip_on=False,
    )  # fmt: skip
    if len(phase.eval_tokens) and np.isfinite(phase.bits_per_byte[-1]):
        axes.annotate(
            f"{phase.bits_per_byte[-1]:.2f} bits/byte", (phase.eval_tokens[-1], phase.eval_loss[-1]), xytext=(-4, 9),
            textcoords="offset points", ha="right", va="bottom", color=_HELD_OUT, fontsize=9, zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip


def _style(axes: "Axes", run: _Run) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("training tokens", color=INK)
    axes.set_ylabel("loss (nats per token, logarithmic)", color=INK)
    axes.set_xlim(0, run.phases[-1].tokens[-1])
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: format_count(round(value)))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(QUIET)


def _draw_density(axes: "Axes", run: _Run) -> "Sequence[Line2D]":
    """Draw the density on an axis of its own; nothing for a run that is dense throughout."""
    tokens = np.concatenate([np.append(phase.begin, phase.tokens) for phase in run.phases])
    # A step's density holds from the end of the step before to its own end.
    density = np.concatenate([np.append(phase.density[0], phase.density) for phase in run.phases])
    if not np.any(density < 1.0):
        return []
    right = axes.twinx()
    line = right.step(tokens, density, where="pre", color=_DENSITY, linewidth=1.3, linestyle="--")
    right.set_ylim(0, 1.05)
    right.set_ylabel("density", color=_DENSITY)
    right.tick_params(colors=_DENSITY, length=0)
    for spine in right.spines.values():
        spine.set_visible(False)
    return line

"""expert_load.png: which experts of which layer had how much to do, over a run.

Shapes: N recorded steps, B of them drawn as columns, L MoE layers, E experts.
"""

import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config import load_config
from sparsetrain.config.units import format_count
from sparsetrain.errors import RunFolderError
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.report.style import INK, QUIET
from sparsetrain.training.expert_trace import TRACE_FILE
from sparsetrain.training.metrics import read_metrics, replace_file
from sparsetrain.training.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

LOAD_PLOT_FILE = "expert_load.png"

_MAX_COLUMNS = 240
"""Steps, or means of several, that a panel shows side by side: about as many as it has pixels."""
_MAX_PANELS = 32
"""Layers that are drawn; of more, this many that stand evenly apart."""
_PANELS_ACROSS = ((3, 1), (12, 2), (_MAX_PANELS, 4))
"""Up to how many panels, how many stand side by side."""
_HEAD, _LEFT, _RIGHT, _BELOW, _BETWEEN = 0.85, 0.5, 0.15, 0.5, 0.32
"""Inches around the panels, and between their rows."""
_OCTAVES = 2
"""Colours reach from a quarter of the mean load to four times it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Loads:
    name: str
    layers: tuple[int, ...]
    """Index in the model of each MoE layer."""
    edges: Floats
    """[B + 1], training tokens at which the columns begin and end."""
    share_LEB: Floats
    """Load over the layer's mean load, a mean over each column's steps; NaN where a layer had no tokens at all."""
    phases: tuple[tuple[str, float, float], ...]
    """Name, first and last token."""


@dataclass(frozen=True)
class _Sheet:
    """Where the panels stand, in inches: a layout that is solved for takes seconds where there are many."""

    across: int
    panel_width: float
    panel_height: float
    head: float
    size: tuple[float, float]

    @classmethod
    def of(cls, num_panels: int, num_experts: int, *, with_phases: bool) -> Self:
        across = next(across for most, across in _PANELS_ACROSS if num_panels <= most)
        down = -(-num_panels // across)
        width, head = 9.6 if across < 3 else 12.8, _HEAD + 0.2 * with_phases
        panel_height = min(max(0.026 * num_experts, 0.95), 2.2)
        panel_width = (width - _LEFT - _RIGHT - (across - 1) * _BETWEEN) / across
        height = head + _BELOW + down * panel_height + (down - 1) * _BETWEEN
        return cls(across, panel_width, panel_height, head, (width, height))

    def panel(self, place: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height as shares of the figure's."""
        width, height = self.size
        row, column = divmod(place, self.across)
        left = _LEFT + column * (self.panel_width + _BETWEEN)
        bottom = height - self.head - self.panel_height - row * (self.panel_height + _BETWEEN)
        return left / width, bottom / height, self.panel_width / width, self.panel_height / height


def plot_expert_load(folder: Path) -> Path | None:
    """Draw a run's expert_load.png from its expert_load.npz: a panel a layer, a row an expert, time to the right.

    White is an even load, red is more, blue is less; the colours mean the same in every picture.

    Returns:
        The picture's path; None where the run has no experts, or not a step yet.

    Raises:
        RunFolderError: Its metrics are damaged, or the picture cannot be written.
        PlacementError: The recorded load is damaged.
    """
    folder = Path(folder)
    if not (folder / TRACE_FILE).is_file():
        return None
    path = folder / LOAD_PLOT_FILE
    image = io.BytesIO()
    _draw(_read(folder)).savefig(image, format="png")
    try:
        replace_file(path, image.getvalue())
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror or error}; free space or make the folder writable") from error
    return path


def _read(folder: Path) -> _Loads:
    trace = LoadTrace.load(folder / TRACE_FILE)
    rows = read_metrics(folder)
    steps, tokens = [0, *(row["step"] for row in rows)], [0.0, *(float(row["tokens"]) for row in rows)]
    phases, begin = [], 0.0
    for name, members in groupby(rows, key=lambda row: str(row.get("phase", ""))):
        end = float(list(members)[-1]["tokens"])
        phases.append((name, begin, end))
        begin = end
    first_N = _columns(len(trace.step_N))
    edges = np.interp(_step_edges(trace.step_N), steps, tokens)[np.append(first_N, len(trace.step_N))]
    load_LEN = trace.load_NLE.transpose(1, 2, 0).astype(np.float64)
    sum_LBN = np.add.reduceat(load_LEN, first_N, axis=2)
    with np.errstate(invalid="ignore"):
        share_LEB = sum_LBN / sum_LBN.mean(axis=1, keepdims=True)
    layers = load_config(folder / CONFIG_FILE, was_trained=True).model.moe_layers
    return _Loads(folder.resolve().name, layers, edges, share_LEB, tuple(phases))


def _columns(num_steps: int) -> NDArray[np.int64]:
    """Index of the first step of each column: all columns as long as one another, but for one step."""
    num_columns = min(num_steps, _MAX_COLUMNS)
    return np.arange(num_columns) * num_steps // num_columns


def _step_edges(step_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The step before each recorded one, and the last; a recorded one stands for those that were left out before it."""
    stride = int(np.diff(step_N).min(initial=step_N[-1]))
    return np.concatenate(([max(0, step_N[0] - stride)], step_N))


def _draw(loads: _Loads) -> "Figure":
    # matplotlib takes most of a second to import, and pyplot would keep state that is not ours.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_experts, _ = loads.share_LEB.shape
    chosen = _spread(num_layers, _MAX_PANELS)
    sheet = _Sheet.of(len(chosen), num_experts, with_phases=len(loads.phases) > 1)
    width, height = sheet.size
    figure = Figure(figsize=sheet.size, dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    for place, layer in enumerate(chosen):
        axes = figure.add_axes(sheet.panel(place))
        colours = _draw_layer(axes, loads, layer)
        is_lowest = place + sheet.across >= len(chosen)
        _style(axes, loads, is_lowest=is_lowest, is_leftmost=place % sheet.across == 0)
        if place < sheet.across:
            _name_phases(axes, loads)
    some = f", {len(chosen)} of {num_layers} layers" if len(chosen) < num_layers else ""
    figure.text(
        _LEFT / width, 1 - 0.3 / height, f"{loads.name}: load of {num_experts} experts{some}", ha="left", va="center",
        fontsize=13, fontweight="bold", color=INK,
    )  # fmt: skip
    _add_scale(figure, colours)
    return figure


def _spread(number: int, most: int) -> list[int]:
    """All of 0 to number - 1, or so many of them that stand evenly apart, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return [round(place * (number - 1) / (most - 1)) for place in range(most)]


def _draw_layer(axes: "Axes", loads: _Loads, layer: int) -> "ScalarMappable":
    from matplotlib.colors import Normalize

    share_EB = loads.share_LEB[layer]
    colour_EB = np.log2(np.maximum(share_EB, 2.0 ** (-2 * _OCTAVES)))  # no tokens at all: as far below as anything
    edges_E = np.arange(len(share_EB) + 1) - 0.5
    mesh = axes.pcolormesh(
        loads.edges, edges_E, np.ma.masked_invalid(colour_EB), cmap="RdBu_r", norm=Normalize(-_OCTAVES, _OCTAVES),
        rasterized=True,
    )  # fmt: skip
    axes.set_title(f"layer {loads.layers[layer]}", loc="left", fontsize=9, color=INK, pad=3)
    axes.set_title(_fullest(share_EB), loc="right", fontsize=8, color=QUIET, pad=3)
    for _, begin, _ in loads.phases[1:]:
        axes.axvline(begin, color=INK, linewidth=0.8, linestyle=":")
    return mesh


def _fullest(share_EB: Floats) -> str:
    """The fullest expert's load in units of the mean, in the first and the last column that have any."""
    peak_B = share_EB.max(axis=0)
    peak_B = peak_B[np.isfinite(peak_B)]
    return f"max/mean {peak_B[0]:.2f} → {peak_B[-1]:.2f}" if len(peak_B) else "no tokens"


def _name_phases(axes: "Axes", loads: _Loads) -> None:
    if len(loads.phases) > 1:
        for name, begin, end in loads.phases:
            axes.annotate(
                name, ((begin + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 16),
                textcoords="offset points", ha="center", va="bottom", color=QUIET, fontsize=9,
            )  # fmt: skip


def _style(axes: "Axes", loads: _Loads, *, is_lowest: bool, is_leftmost: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    num_experts = loads.share_LEB.shape[1]
    axes.set_xlim(loads.edges[0], loads.edges[-1])
    axes.set_ylim(num_experts - 0.5, -0.5)
    axes.set_yticks(range(0, num_experts, 1 if num_experts <= 8 else -(-num_experts // 4)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(round(value)))
    axes.tick_params(colors=QUIET, length=0, labelsize=8, labelbottom=is_lowest, labelleft=is_leftmost)
    if is_lowest:
        axes.set_xlabel("training tokens", color=INK, fontsize=9)
    if is_leftmost:
        axes.set_ylabel("expert", color=INK, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _add_scale(figure: "Figure", colours: "ScalarMappable") -> None:
    """Explain the colours at the top right, as large in every picture."""
    width, height = figure.get_size_inches()
    marks = range(-_OCTAVES, _OCTAVES + 1)
    scale = figure.add_axes((1 - 2.6 / width, 1 - 0.3 / height, 2.4 / width, 0.12 / height))
    bar = figure.colorbar(colours, cax=scale, orientation="horizontal", extend="both", ticks=list(marks))
    scale.set_xticklabels(["even" if not mark else f"{2**mark}x" if mark > 0 else f"1/{2**-mark}" for mark in marks])
    scale.tick_params(colors=QUIET, length=0, labelsize=8, pad=2)
    scale.text(
        -0.06, 0.5, "load over\nthe layer's mean", transform=scale.transAxes, ha="right", va="center", color=QUIET,
        fontsize=8,
    )  # fmt: skip
    bar.outline.set_visible(False)

"""Figures of the attention benchmark: speed-up against density, and the roofline."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.registry import Row

_PASSES = ("forward", "backward")
_COLORS = {"float32": "tab:blue", "bfloat16": "tab:orange"}
_MARKERS = {"dense SDPA": "o", "FlexAttention": "s", "FlashAttention": "^"}


def draw(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Both figures, with a panel for each pass."""
    return {"speedup": _figure(rows, _speedup), "roofline": _figure(rows, _roofline)}


def _figure(rows: Sequence[Row], panel: Callable[[Axes, Sequence[Row]], None]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(_PASSES)), _PASSES, strict=True):
        panel(axes, [row for row in rows if row.details["pass"] == what])
        axes.set_title(what)
        axes.grid(alpha=0.3, which="both")
    return figure


def _speedup(axes: Axes, rows: Sequence[Row]) -> None:
    """Peer ÷ ours with its interval; 1 ÷ density is what skipping hidden blocks could give at best."""
    for dtype, color in _COLORS.items():
        for peer, marker in _MARKERS.items():
            chosen = [row for row in rows if row.details["dtype"] == dtype and row.peer_name == peer]
            for causal, filled in ((True, color), (False, "none")):
                part = [row for row in chosen if bool(row.details["causal"]) == causal]
                if not part:
                    continue
                figures = [row.figure for row in part]
                middle = np.array([f.median for f in figures])
                spread = [middle - [f.low for f in figures], [f.high for f in figures] - middle]
                label = f"over {peer}, {dtype}, {'causal' if causal else 'not causal'}"
                at = [float(row.details["density"]) for row in part]
                style = {"fmt": marker, "color": color, "markerfacecolor": filled, "capsize": 2}
                axes.errorbar(at, middle, yerr=spread, label=label, **style)
    densities = np.geomspace(min((float(row.details["density"]) for row in rows), default=0.1), 1)
    axes.plot(densities, 1 / densities, color="gray", linestyle=":", label="1 ÷ density")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="density of the layout", ylabel="speed-up")
    axes.legend(fontsize=7)


def _roofline(axes: Axes, rows: Sequence[Row]) -> None:
    """Rate of products over visible scores against those per byte that must move, under what the machine can do."""
    for dtype, color in _COLORS.items():
        part = [row for row in rows if row.details["dtype"] == dtype and row.peer_name == "dense SDPA"]
        if not part:
            continue
        intensity = [1e3 * float(row.details["active_gflop"]) / float(row.details["megabytes"]) for row in part]
        axes.scatter(intensity, [float(row.details["gflop_per_s"]) for row in part], color=color, label=dtype)
        for x, row in zip(intensity, part, strict=True):
            label = f"{row.details['pattern']}, {row.details['tokens']}"
            axes.annotate(label, (x, float(row.details["gflop_per_s"])), fontsize=6, rotation=20)
        peak, bandwidth = (float(part[0].details[key]) for key in ("peak_gflop_per_s", "peak_gb_per_s"))
        reach = np.geomspace(min(intensity) / 4, max(intensity) * 4)
        axes.plot(reach, np.minimum(peak, bandwidth * reach), color=color, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP on visible scores ÷ byte", ylabel="GFLOP/s on visible scores")
    axes.legend(fontsize=7)

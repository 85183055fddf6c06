"""A layout's picture; matplotlib is imported when one is drawn."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS_A_ROW = 4
_PANEL_INCHES = 2.6


def draw(mask: Tensor, block: int, diagonal: int | None, first_query: int, first_key: int) -> "Figure":
    """A panel a head: queries downwards, keys to the right, visible blocks filled.

    Args:
        mask: Bool [H, Q, K] on the CPU.
        block: Tokens of a block, for the title.
        diagonal: Hide blocks right of this diagonal; None for none.
        first_query: Number of the first block of queries.
        first_key: Number of the first block of keys.
    """
    from matplotlib.figure import Figure

    num_heads = len(mask)
    across = min(num_heads, _PANELS_A_ROW)
    down = -(-num_heads // across)
    figure = Figure(figsize=(_PANEL_INCHES * across, _PANEL_INCHES * down + 0.3), layout="constrained")
    panels = np.ravel(figure.subplots(down, across, squeeze=False))
    visible = mask if diagonal is None else mask.tril(diagonal)
    left, top = first_key - 0.5, first_query - 0.5
    extent = (left, left + mask.shape[2], top + mask.shape[1], top)
    for head, panel in enumerate(panels):
        if head >= num_heads:
            panel.set_axis_off()
            continue
        panel.imshow(visible[head].numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest", extent=extent)
        panel.set_title("all heads" if num_heads == 1 else f"head {head}", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.locator_params(integer=True)
    figure.supxlabel(f"key block (of {block} tokens)", fontsize=9)
    figure.supylabel("query block", fontsize=9)
    return figure

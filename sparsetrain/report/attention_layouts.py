"""attention_layouts.png: which blocks of keys each head of a run's sparse attention sees."""

import io
from pathlib import Path

from sparsetrain.config import BlockSparseAttention, RunConfig, load_config
from sparsetrain.errors import RunFolderError
from sparsetrain.models.attention_layouts import attention_layout
from sparsetrain.report.style import INK
from sparsetrain.training.formatting import percent
from sparsetrain.training.metrics import replace_file
from sparsetrain.training.run_folder import ATTENTION_PLOT_FILE, CONFIG_FILE

_MAX_HEADS = 16
"""Heads that are drawn: patterns come again after some."""


def plot_attention_layouts(folder: Path) -> Path | None:
    """Draw a run's attention_layouts.png from its config: a panel a head, or one for all where they are alike.

    Returns:
        The picture's path; None where the run's attention is dense, or the folder is not to be seen from here.

    Raises:
        RunFolderError: The picture cannot be written.
        ConfigError: The config is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        return None
    config = load_config(folder / CONFIG_FILE, was_trained=True)
    if not isinstance(config.model.attention, BlockSparseAttention):
        return None
    path = folder / ATTENTION_PLOT_FILE
    image = _draw(config, config.model.attention)
    try:
        replace_file(path, image)
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror or error}; free space or make the folder writable") from error
    return path


def _draw(config: RunConfig, attention: BlockSparseAttention) -> bytes:
    model, num_tokens = config.model, max(phase.data.seq_len for phase in config.phases)
    layout = attention_layout(attention, model.num_heads, num_tokens)
    density = layout.density(causal=True)
    some = ""
    if layout.num_heads > _MAX_HEADS:
        layout, some = layout.slice_heads(0, _MAX_HEADS), f", the first {_MAX_HEADS} of {model.num_heads} heads"
    figure = layout.plot(causal=True)
    figure.set_dpi(110)
    figure.set_facecolor("white")
    title = f"{config.name}: {percent(density)} of the causal blocks of {num_tokens} tokens{some}\n{_layers(config)}"
    figure.suptitle(title, fontsize=9, color=INK)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _layers(config: RunConfig) -> str:
    sparse, num_layers = config.model.sparse_attention_layers, config.model.num_layers
    if len(sparse) == num_layers:
        return "in all layers"
    some = ", ".join(map(str, sparse)) if len(sparse) <= 8 else f"{sparse[0]}, {sparse[1]}, … {sparse[-1]}"
    return f"in {len(sparse)} of {num_layers} layers: {some}"

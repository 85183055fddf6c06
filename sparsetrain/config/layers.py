"""Which layers of a model a section is about: `all`, `{every: k}` or a list."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from sparsetrain.config.base import Int, KeyConflict, Section


class EveryLayers(Section):
    """The last of every k layers: of 4 layers with `every: 2`, layers 1 and 3."""

    every: Int = Field(gt=0)


def _layers_form(value: object) -> str:
    """Which of the forms of `layers` was written; `<>` keeps the tags apart from keys."""
    if isinstance(value, dict | EveryLayers):
        return "<every>"
    return "<list>" if isinstance(value, list | tuple) else "<all>"


def _is_a_form(value: object) -> object:
    if value != "all" and not isinstance(value, dict | EveryLayers | list | tuple):
        raise ValueError("expected all, {every: k} or a list of layers")
    return value


Layers = Annotated[
    Annotated[Literal["all"], Tag("<all>")]
    | Annotated[EveryLayers, Tag("<every>")]
    | Annotated[tuple[Annotated[Int, Field(ge=0)], ...], Field(min_length=1), Tag("<list>")],
    Discriminator(_layers_form),
    BeforeValidator(_is_a_form),
]


def layer_indices(layers: Layers, num_layers: int, *, none_left: str) -> tuple[int, ...]:
    """Which of a model's layers are meant, ascending.

    Args:
        layers: What was written.
        num_layers: Layers of the model.
        none_left: What it means that no layer is, for the error.

    Raises:
        KeyConflict: `layers` names a layer that the model does not have, or one twice, or none is left.
    """
    if isinstance(layers, EveryLayers):
        if layers.every > num_layers:
            raise KeyConflict("layers.every", f"must not be above num_layers={num_layers}: {none_left}")
        return tuple(range(layers.every - 1, num_layers, layers.every))
    if layers == "all":
        return tuple(range(num_layers))
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise KeyConflict("layers", f"there is no layer {beyond[0]}; num_layers={num_layers}, counted from 0")
    if len(set(layers)) < len(layers):
        raise KeyConflict("layers", "names a layer twice")
    return tuple(sorted(layers))

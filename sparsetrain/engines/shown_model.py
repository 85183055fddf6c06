"""A model as libraries of data parallelism are to see it."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


class ShownModel(nn.Module):
    """A model that is run under autocast, and whose expert stores are not shown.

    Args:
        model: The whole, or what this rank has of it.
        kept_apart: Parameters that the library must not partition, reduce or broadcast: those of expert stores.
        autocast: Entered around each forward pass, inside of what the library puts around it.
    """

    def __init__(
        self, model: nn.Module, kept_apart: Iterable[nn.Parameter], autocast: AbstractContextManager[None]
    ) -> None:
        super().__init__()
        self.model = model
        self._kept_apart = {id(parameter) for parameter in kept_apart}
        self._autocast = autocast

    def forward(self, *args: Any) -> Any:
        """The model's own result."""
        with self._autocast:
            return self.model(*args)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All but those that are kept apart."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) not in self._kept_apart:
                yield name, parameter

"""How much work the experts of a layer had in a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.moe.routing import Routing


@dataclass(frozen=True)
class Load:
    """What was counted, as one vector: that of several layers can be stacked and summed over ranks at once."""

    values: Tensor
    """int64 [E + 2]: `counts_E`, `num_tokens`, `dropped`."""

    @property
    def counts_E(self) -> Tensor:
        """int64 [E]: tokens that wanted each expert, whether or not there was room."""
        return self.values[..., :-2]

    @property
    def num_tokens(self) -> Tensor:
        """0-d int64."""
        return self.values[..., -2]

    @property
    def dropped(self) -> Tensor:
        """0-d int64: assignments that exceeded an expert's capacity."""
        return self.values[..., -1]


class LoadMeter:
    """Adds up the load of a layer until it is taken; nothing waits for the device.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._total: Tensor | None = None

    @torch.no_grad()
    def add(self, wanted: Routing, dropped: Tensor) -> None:
        """Count the tokens of one forward pass.

        Args:
            wanted: What the router said.
            dropped: 0-d int64, assignments that found no room.
        """
        tokens = torch.full_like(dropped, wanted.num_tokens)
        values = torch.cat([wanted.counts_E, torch.stack([tokens, dropped])])
        self._total = values if self._total is None else self._total + values

    def read(self) -> Load:
        """The load since it was last taken."""
        return Load(torch.zeros(self._num_experts + 2, dtype=torch.int64) if self._total is None else self._total)

    def take(self) -> Load:
        """The load since it was last taken, to begin anew: once an optimizer step."""
        load = self.read()
        self._total = None
        return load

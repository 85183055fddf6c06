"""Experts as they travel and as they are computed with: packed in rows, and as the matrices of a rank's slots.

Shapes: C numbers of an expert; H, D, F as in `sparsetrain.moe.experts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from sparsetrain.moe import ExpertSpec
from sparsetrain.moe.placement import Placement
from sparsetrain.parallel.fssdp.collectives import Route, Transfer


class PackedExperts:
    """Experts end to end in one buffer: each is a row that holds its matrices, then its biases, one after another.

    Args:
        spec: The shape of an expert.
        rows: [N, C], contiguous.
    """

    def __init__(self, spec: ExpertSpec, rows: Tensor) -> None:
        self.rows = rows
        self._stacks: dict[str, tuple[Tensor, ...]] = {}
        pieces = torch.split(rows, [prod(shape) for shape in spec.shapes.values()], dim=1)
        for (name, shape), piece in zip(spec.shapes.items(), pieces, strict=True):
            self._stacks[name] = piece.view(len(rows), *shape).unbind()

    @classmethod
    def empty(cls, spec: ExpertSpec, num_experts: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Room for experts."""
        return cls(spec, torch.empty(num_experts, spec.numel, dtype=dtype, device=device))

    def __getitem__(self, stack: str) -> tuple[Tensor, ...]:
        """Each expert's tensor of a stack ("w_in", ...), contiguous, sharing the buffer's memory."""
        return self._stacks[stack]

    def fill(self, experts: Mapping[str, Sequence[Tensor]]) -> Self:
        """Copy experts in, in order, rounded to the buffer's dtype."""
        for name, stack in self._stacks.items():
            if stack:
                torch._foreach_copy_(list(stack), list(experts[name]))
        return self


@dataclass(frozen=True)
class LocalExperts:
    """The tensors of a rank's experts of one layer, or their gradients: one of each list a slot."""

    experts: tuple[int, ...]
    """Whose slots these are: the owned experts ascending, then the replicas ascending."""
    w_in: list[Tensor]
    """[H, D]"""
    w_out: list[Tensor]
    """[D, F]"""
    b_in: list[Tensor] | None
    """[H]"""
    b_out: list[Tensor] | None
    """[D]"""

    @classmethod
    def of(cls, experts: Sequence[int], stacks: Mapping[str, Sequence[Tensor]]) -> Self:
        """From lists of tensors by stack."""
        lists = {name: list(stacks[name]) if name in stacks else None for name in ("b_in", "b_out")}
        return cls(tuple(experts), list(stacks["w_in"]), list(stacks["w_out"]), **lists)


class Replicas:
    """The experts of one layer that a rank holds and does not own, and the gradients it computes for them.

    Args:
        spec: The shape of an expert.
        layer: Whose experts, for messages.
        placement: Who holds what.
        route: This rank's part of it.
        weights: Weights on their way; None where the placement has no replicas at all.
        dtype: What the weights are in, and so the gradients: both travel.
        device: Where.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        layer: int,
        placement: Placement,
        route: Route,
        weights: Transfer | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layer, self.placement, self.route = layer, placement, route
        self.dtype = dtype
        self.experts = tuple(sorted(route.received))
        """Ascending."""
        self.bytes_received = 0 if weights is None else weights.bytes_received
        """expert_bytes · |P′_d \\ P_d|"""
        self._spec, self._device = spec, device
        self._slots = [route.received.index(expert) for expert in self.experts]
        self._transfer = weights
        self._weights: PackedExperts | None = None if weights else PackedExperts.empty(spec, 0, dtype, device)
        self._gradients: PackedExperts | None = None

    def wait(self) -> Self:
        """Have the weights here; see Transfer.wait."""
        if self._transfer is not None:
            self._weights = PackedExperts(self._spec, self._transfer.wait())
            self._transfer = None
        return self

    def free(self) -> None:
        """Let go of the weights, after the last product with them; gradients stay."""
        self.wait()
        self._weights = None

    def weights(self, stack: str) -> list[Tensor]:
        """Each replica's tensor of a stack, in the order of `experts`."""
        packed = self.wait()._weights
        assert packed is not None, f"the replicas of layer {self.layer} are used after they were freed"
        return [packed[stack][slot] for slot in self._slots]

    def gradients(self, stack: str) -> list[Tensor]:
        """Tensors to add each replica's gradient to, in the order of `experts`; 0 at first."""
        if self._gradients is None:
            shape = (len(self.experts), self._spec.numel)
            self._gradients = PackedExperts(self._spec, torch.zeros(shape, dtype=self.dtype, device=self._device))
        packed = self._gradients
        return [packed[stack][slot] for slot in self._slots]

    def take_gradients(self) -> Tensor:
        """The gradients as they travel, [R, C] in the order of the route; what follows begins at 0 again."""
        self.gradients("w_in")
        packed, self._gradients = self._gradients, None
        assert packed is not None
        return packed.rows

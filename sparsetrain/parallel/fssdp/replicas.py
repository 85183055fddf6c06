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
        route: This rank's part of it, by which gradients go home.
        gathered: What of it comes over the wire; the rest is taken over from other replicas.
        dtype: What the weights are in, and so the gradients: both travel.
        device: Where.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        layer: int,
        placement: Placement,
        route: Route,
        gathered: Route,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layer, self.placement, self.route = layer, placement, route
        self.dtype = dtype
        self.experts = tuple(sorted(route.received))
        """Ascending."""
        self._spec, self._device = spec, device
        self._gathered = gathered.received
        self._kept = [expert for expert in self.experts if expert not in self._gathered]
        in_rows = [*self._gathered, *self._kept]
        self._weight_rows = [in_rows.index(expert) for expert in self.experts]
        self._gradient_rows = [route.received.index(expert) for expert in self.experts]
        self._transfer: Transfer | None = None
        self._weights: PackedExperts | None = PackedExperts.empty(spec, len(in_rows), dtype, device)
        self._gradients: PackedExperts | None = None

    @property
    def room(self) -> Tensor:
        """Where the gathered weights go: [R, C]."""
        assert self._weights is not None
        return self._weights.rows[: len(self._gathered)]

    @property
    def bytes_received(self) -> int:
        """expert_bytes · |P′_d \\ P_d|, P_d being what was here before."""
        return len(self._gathered) * self._spec.numel * self.dtype.itemsize

    def expect(self, weights: Transfer) -> None:
        """Weights are on their way into `room`."""
        self._transfer = weights

    def take_over(self, others: "Replicas") -> None:
        """Copy the weights that are not gathered from replicas of the same layer, which are then freed."""
        assert self._weights is not None
        for name in self._spec.shapes:
            theirs = dict(zip(others.experts, others.weights(name), strict=True))
            mine = self._weights[name][len(self._gathered) :]
            if mine:
                torch._foreach_copy_(list(mine), [theirs[expert] for expert in self._kept])
        others.free()

    def wait(self) -> Self:
        """Have the weights here; see Transfer.wait."""
        if self._transfer is not None:
            self._transfer.wait()
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
        return [packed[stack][row] for row in self._weight_rows]

    def gradients(self, stack: str) -> list[Tensor]:
        """Tensors to add each replica's gradient to, in the order of `experts`; 0 at first."""
        if self._gradients is None:
            shape = (len(self.experts), self._spec.numel)
            self._gradients = PackedExperts(self._spec, torch.zeros(shape, dtype=self.dtype, device=self._device))
        packed = self._gradients
        return [packed[stack][row] for row in self._gradient_rows]

    def take_gradients(self) -> Tensor:
        """The gradients as they travel, [R, C] in the order of the route; what follows begins at 0 again."""
        self.gradients("w_in")
        packed, self._gradients = self._gradients, None
        assert packed is not None
        return packed.rows

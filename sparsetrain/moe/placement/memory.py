"""Bytes of experts on a device and on the wire, as closed formulas."""

from dataclasses import dataclass

import numpy as np

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import IntArray


@dataclass(frozen=True)
class ExpertBytes:
    """Bytes of one expert.

    Args:
        numel: Its parameters.
        weight_itemsize: Bytes of a master weight on its owner.
        state_itemsize: Bytes of optimizer state for a weight: 8 for Adam's two fp32 moments.
        replica_itemsize: Bytes of a weight on the wire and in a replica, 2 for bf16.
        gradient_itemsize: Bytes of a gradient in a replica and on the wire.
    """

    numel: int
    weight_itemsize: int = 4
    state_itemsize: int = 8
    replica_itemsize: int = 2
    gradient_itemsize: int = 2

    @property
    def owned(self) -> int:
        """Parameters and optimizer state on the owner."""
        return self.numel * (self.weight_itemsize + self.state_itemsize)

    @property
    def replica(self) -> int:
        """Weights of a replica: also what spAG moves for it."""
        return self.numel * self.replica_itemsize

    @property
    def replica_gradient(self) -> int:
        """Gradient of a replica: also what spRS moves for it."""
        return self.numel * self.gradient_itemsize


def owned_bytes(owners_LE: IntArray, device: int, expert: ExpertBytes) -> int:
    """Parameter and optimizer bytes of the experts that a device owns in all layers: L·E/D experts' when even."""
    return int((owners_LE == device).sum()) * expert.owned


def materialised_bytes(placements: list[Placement], device: int, expert: ExpertBytes, *, freed: bool) -> int:
    """Peak bytes of a device's replicas over a step.

    Kept from forward to backward, they are there in all layers at once. Freed after each layer (re-materialisation), at
    most two neighbours' are there: those of the layer that is computed, and of the one that is next. Of gradients, two
    neighbours' are there in either case: one layer's are computed while those of the layer after it travel home.

    Args:
        placements: One a layer.
        device: The device.
        expert: Bytes of an expert.
        freed: Whether replicas are freed after the forward pass of their layer and gathered again in the backward pass.
    """
    replicas_L = [len(placement.replicas_of(device)) for placement in placements]
    of_two = max((sum(replicas_L[layer : layer + 2]) for layer in range(len(replicas_L))), default=0)
    weights = of_two if freed else sum(replicas_L)
    return weights * expert.replica + of_two * expert.replica_gradient


def received_bytes(placement: Placement, device: int, expert: ExpertBytes) -> int:
    """Bytes that spAG brings to a device: expert bytes · |P′_d \\ P_d| (arXiv 2502.02581)."""
    return len(placement.replicas_of(device)) * expert.replica


def returned_bytes(placement: Placement, device: int, expert: ExpertBytes) -> int:
    """Bytes that spRS brings to a device: a gradient from each replica of each expert that it owns."""
    held_by = np.asarray(placement.holders_ED[placement.owner_E == device]).sum()
    return int(held_by - (placement.owner_E == device).sum()) * expert.replica_gradient


def check_slots(slots: int, num_layers: int, expert: ExpertBytes, *, freed: bool, available_bytes: int) -> None:
    """Refuse spare slots that cannot be had, before any of them is filled.

    Raises:
        PlacementError: Filled slots would take more than `available_bytes`.
    """
    layers = min(num_layers, 2) if freed else num_layers
    per_slot = layers * expert.replica + min(num_layers, 2) * expert.replica_gradient
    needed = slots * per_slot
    if needed > available_bytes:
        fitting = available_bytes // per_slot
        advice = "" if freed else ", or re-materialise, which frees replicas between uses"
        raise PlacementError(
            f"{slots} spare expert slots need {needed / 2**20:.0f} MiB a device, but {available_bytes / 2**20:.0f} MiB "
            f"are free: use at most {fitting}{advice}"
        )

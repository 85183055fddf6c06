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

    Kept, the weights of all layers are there when the backward pass begins, and go layer by layer. Freed after their
    layer (re-materialisation), a layer's are there, and those of the layer that is next while they are gathered. Of
    gradients there are those of the layer that is computed, and of the one before while they travel home.

    Args:
        placements: One a layer.
        device: The device.
        expert: Bytes of an expert.
        freed: Whether replicas are freed after the forward pass of their layer and gathered again in the backward pass.
    """
    return _peak_bytes([len(placement.replicas_of(device)) for placement in placements], expert, freed=freed)


def _peak_bytes(replicas_L: list[int], expert: ExpertBytes, *, freed: bool) -> int:
    """Peak bytes of so many replicas in each layer."""
    peak = 0
    for layer, here in enumerate(replicas_L):
        held = here if freed else sum(replicas_L[: layer + 1])
        travelling = here + sum(replicas_L[layer + 1 : layer + 2])
        computing = held * expert.replica + travelling * expert.replica_gradient
        gathering = sum(replicas_L[max(layer - 1, 0) : layer + 1]) if freed else held
        peak = max(peak, computing, gathering * expert.replica + here * expert.replica_gradient)
    return peak


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
    per_slot = _peak_bytes([1] * num_layers, expert, freed=freed)
    needed = slots * per_slot
    if needed > available_bytes:
        fitting = available_bytes // per_slot
        advice = "" if freed else ", or re-materialise, which frees replicas between uses"
        raise PlacementError(
            f"{slots} spare expert slots need {needed / 2**20:.0f} MiB a device, but {available_bytes / 2**20:.0f} MiB "
            f"are free: use at most {fitting}{advice}"
        )

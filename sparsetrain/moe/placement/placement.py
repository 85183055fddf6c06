"""Which devices hold which experts of a layer: who owns each, and who has a replica of it for one step."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.topology import BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class Placement:
    """The holders of each expert of one layer (P′ of arXiv 2502.02581; P is the placement of the owners alone).

    Args:
        owner_E: int64 [E], the device that owns each expert: its master weights, gradient and optimizer state.
        holders_ED: bool [E, D], true where a device has the expert's weights in this step; the owner always has.

    Raises:
        PlacementError: Shapes do not agree, an owner is no device, or an owner does not hold its expert.
    """

    owner_E: IntArray
    holders_ED: BoolArray

    def __post_init__(self) -> None:
        if self.holders_ED.ndim != 2 or self.owner_E.shape != self.holders_ED.shape[:1]:
            raise PlacementError(
                f"owners of shape {self.owner_E.shape} do not go with holders of shape {self.holders_ED.shape}: "
                "expected [E] and [E, D]"
            )
        if self.num_experts and not 0 <= self.owner_E.min() <= self.owner_E.max() < self.num_devices:
            raise PlacementError(f"an owner is outside devices 0 to {self.num_devices - 1}: {self.owner_E.tolist()}")
        owners_hold_E = self.holders_ED[np.arange(self.num_experts), self.owner_E]
        if not owners_hold_E.all():
            raise PlacementError(f"experts {np.flatnonzero(~owners_hold_E).tolist()} are not held by their owners")

    @classmethod
    def of_owners(cls, owner_E: IntArray, num_devices: int) -> "Placement":
        """Expert parallelism: every expert on its owner alone."""
        holders_ED = np.zeros((len(owner_E), num_devices), dtype=np.bool_)
        holders_ED[np.arange(len(owner_E)), owner_E] = True
        return cls(owner_E, holders_ED)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.owner_E)

    @property
    def num_devices(self) -> int:
        """D."""
        return int(self.holders_ED.shape[1])

    @property
    def num_replicas(self) -> int:
        """Copies besides the owners', over all devices."""
        return len(self.expert_P) - self.num_experts

    @property
    def expert_P(self) -> IntArray:
        """int64 [P]: the expert of each (expert, holder) pair, in ascending order of expert, then device."""
        return self._pairs[0]

    @property
    def device_P(self) -> IntArray:
        """int64 [P]: the device of each pair."""
        return self._pairs[1]

    def replicas_of(self, device: int) -> IntArray:
        """int64, ascending: the experts that a device holds and does not own."""
        return np.flatnonzero(self.holders_ED[:, device] & (self.owner_E != device))

    def owned_by(self, device: int) -> IntArray:
        """int64, ascending: the experts that a device owns."""
        return np.flatnonzero(self.owner_E == device)

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that are equal for equal placements in every process, for comparing ranks' plans."""
        digest = blake2b(repr(self.holders_ED.shape).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.owner_E, dtype=np.int64).data)
        digest.update(self._held.data)
        return int.from_bytes(digest.digest(), "little") >> 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return np.array_equal(self.owner_E, other.owner_E) and np.array_equal(self.holders_ED, other.holders_ED)

    def __hash__(self) -> int:
        return self.fingerprint

    @cached_property
    def _pairs(self) -> tuple[IntArray, IntArray]:
        expert_P, device_P = np.divmod(self._held, self.num_devices)
        return expert_P, device_P

    @cached_property
    def _held(self) -> IntArray:
        """int64 [P]: where `holders_ED` is true, in its flat order."""
        return np.flatnonzero(self.holders_ED)


def own_evenly(num_layers: int, num_experts: int, num_devices: int) -> IntArray:
    """Owners as expert parallelism has them: expert e of every layer on device e·D // E.

    Where E is not a multiple of D, the devices that own one expert more than others change from layer to layer, so
    that over all layers together each device owns L·E/D experts, rounded up or down.

    Returns:
        int64 [L, E]; in every layer the owners ascend with the expert.

    Raises:
        PlacementError: A number is below one.
    """
    for name, number in (("num_layers", num_layers), ("num_experts", num_experts), ("num_devices", num_devices)):
        if number < 1:
            raise PlacementError(f"{name} is {number}, but must be at least 1")
    each, extra = divmod(num_experts, num_devices)
    # Extra experts are dealt to the devices in turn, the turn passing on from layer to layer; its order takes strides
    # so that the extra experts of one layer stand far apart, in different nodes.
    stride = num_devices // extra if extra else 1
    devices_D = np.arange(num_devices)
    turn_D = np.lexsort((devices_D // stride, devices_D % stride))
    owners_LE = np.empty((num_layers, num_experts), dtype=np.int64)
    for layer in range(num_layers):
        counts_D = np.full(num_devices, each)
        counts_D[turn_D[(layer * extra + np.arange(extra)) % num_devices]] += 1
        owners_LE[layer] = np.repeat(devices_D, counts_D)
    return owners_LE

"""Devices and the nodes they stand in."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparsetrain.errors import PlacementError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Topology:
    """Devices 0..D-1 of an expert group, `devices_per_node` of them in each node, in order.

    The last node may be smaller. One node for all devices means that no transfer costs more than another.

    Raises:
        PlacementError: A number is below one.
    """

    num_devices: int
    devices_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_devices", "devices_per_node"):
            if getattr(self, name) < 1:
                raise PlacementError(f"{name} is {getattr(self, name)}, but must be at least 1")

    @property
    def num_nodes(self) -> int:
        """Nodes that hold a device."""
        return -(-self.num_devices // self.devices_per_node)

    @cached_property
    def node_D(self) -> IntArray:
        """int64 [D]: the node of each device; never falls from one device to the next."""
        return np.arange(self.num_devices, dtype=np.int64) // self.devices_per_node

    @cached_property
    def first_of_node_N(self) -> IntArray:
        """int64 [N]: the first device of each node."""
        return np.arange(0, self.num_devices, self.devices_per_node, dtype=np.int64)

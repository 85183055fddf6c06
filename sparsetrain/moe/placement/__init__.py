"""Where experts live, as pure data, and the planners that decide it: numpy only, the same result on every rank.

A plan is a function of numbers that all ranks share (loads, owners, the topology). It draws no random numbers, asks no
clock and iterates over no set, so ranks that plan for themselves agree; a `fingerprint` lets them make sure.
"""

from sparsetrain.moe.placement.dispatch import Dispatch, DispatchMethod, dispatch
from sparsetrain.moe.placement.materialise import PlacementMethod, materialise, materialise_layers
from sparsetrain.moe.placement.placement import Placement, own_evenly
from sparsetrain.moe.placement.topology import Topology

__all__ = [
    "Dispatch",
    "DispatchMethod",
    "Placement",
    "PlacementMethod",
    "Topology",
    "dispatch",
    "materialise",
    "materialise_layers",
    "own_evenly",
]

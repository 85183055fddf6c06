"""Where experts live, as pure data, and the planners that decide it: numpy only, the same result on every rank.

A plan is a function of numbers that all ranks share (loads, owners, the topology). It draws no random numbers, asks no
clock and iterates over no set, so ranks that plan for themselves agree; a `fingerprint` lets them make sure.
"""

from sparsetrain.moe.placement.cost import CostModel
from sparsetrain.moe.placement.dispatch import Dispatch, DispatchMethod, dispatch
from sparsetrain.moe.placement.forecast import LoadForecast
from sparsetrain.moe.placement.materialise import PlacementMethod, materialise, materialise_layers
from sparsetrain.moe.placement.memory import (
    ExpertBytes,
    check_slots,
    materialised_bytes,
    owned_bytes,
    received_bytes,
    returned_bytes,
)
from sparsetrain.moe.placement.placement import Placement, own_evenly
from sparsetrain.moe.placement.resharding import reshard_owners
from sparsetrain.moe.placement.scenarios import SCENARIOS, Scenario, scenario
from sparsetrain.moe.placement.slots import fastest_placement, most_replicas, slots_to_try
from sparsetrain.moe.placement.topology import Topology
from sparsetrain.moe.placement.trace import LoadTrace, TraceRecorder

__all__ = [
    "SCENARIOS",
    "CostModel",
    "Dispatch",
    "DispatchMethod",
    "ExpertBytes",
    "LoadForecast",
    "LoadTrace",
    "Placement",
    "PlacementMethod",
    "Scenario",
    "Topology",
    "TraceRecorder",
    "check_slots",
    "dispatch",
    "fastest_placement",
    "materialise",
    "materialise_layers",
    "materialised_bytes",
    "most_replicas",
    "own_evenly",
    "owned_bytes",
    "received_bytes",
    "reshard_owners",
    "returned_bytes",
    "scenario",
    "slots_to_try",
]

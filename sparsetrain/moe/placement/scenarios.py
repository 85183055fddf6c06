"""Load scenarios L0–L8: what every figure of balance and speed is measured on.

Each gives, for every step, the probability that a row of a source rank goes to an expert; rows are drawn independently.

- L0: every expert alike.
- L1, L2, L3: Zipf with exponent 0.5, 1, 1.5: the expert of rank i has a share in proportion to i^-s; ranks are dealt to
  experts by the seed.
- L4: one expert, chosen by the seed, has half of all rows; the others share the rest alike.
- L5: as L4, and the hot expert moves to another one every 10 steps.
- L6: the experts that the upper half of the ranks own get nothing; the others alike.
- L7: the rows of rank s go to the experts of the rank half the group away, (s + D // 2) mod D, alike; where that rank
  owns none, to those of the next that does.
- L8: the shares of a recorded load (`LoadTrace`), its steps over and over.

The distribution is the same for all sources but in L7, and in L8 where the trace has loads per source.
"""

from dataclasses import dataclass

import numpy as np

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.placement import own_evenly
from sparsetrain.moe.placement.topology import FloatArray, IntArray
from sparsetrain.moe.placement.trace import LoadTrace

SCENARIOS = tuple(f"L{number}" for number in range(9))
STEPS_BETWEEN_MOVES = 10
_ZIPF = {"L1": 0.5, "L2": 1.0, "L3": 1.5}


@dataclass(frozen=True, eq=False)
class Scenario:
    """A load scenario of one layer; made by `scenario`.

    Args:
        name: L0 to L8.
        owner_E: int64 [E], who owns the experts before any resharding; L6 and L7 are defined by it.
        num_devices: D; every device is a source.
        seed: Deals the experts, and draws the rows.
        replayed_NSE: For L8, float64 [steps, S or 1, E], recorded loads.
    """

    name: str
    owner_E: IntArray
    num_devices: int
    seed: int
    replayed_NSE: FloatArray | None = None

    def probabilities_SE(self, step: int) -> FloatArray:
        """float64 [S, E]: where the rows of each source go in a step; every row sums to 1."""
        weight_SE = np.broadcast_to(self._weights(step), (self.num_devices, len(self.owner_E)))
        probabilities_SE: FloatArray = weight_SE / weight_SE.sum(axis=1, keepdims=True)
        return probabilities_SE

    def counts_SE(self, step: int, rows_per_source: int) -> IntArray:
        """int64 [S, E]: rows of each source for each expert, drawn anew in every step, the same for the same seed.

        Args:
            step: From 0.
            rows_per_source: Tokens of a source times k.
        """
        generator = np.random.default_rng([self.seed, step])
        counts_SE: IntArray = generator.multinomial(rows_per_source, self.probabilities_SE(step))
        return counts_SE

    def _weights(self, step: int) -> FloatArray:
        """Weights of experts, float64 [E] or [S, E], not yet summing to 1."""
        num_experts = len(self.owner_E)
        if self.replayed_NSE is not None:
            replayed_SE: FloatArray = self.replayed_NSE[step % len(self.replayed_NSE)]
            return replayed_SE
        dealt_E = np.random.default_rng(self.seed).permutation(num_experts)
        weight_E = np.ones(num_experts)
        if self.name in _ZIPF:
            weight_E[dealt_E] = np.arange(1, num_experts + 1) ** -_ZIPF[self.name]
        elif self.name in ("L4", "L5"):
            moves = step // STEPS_BETWEEN_MOVES if self.name == "L5" else 0
            weight_E[dealt_E[moves % num_experts]] = max(num_experts - 1, 1)
        elif self.name == "L6":
            weight_E[self.owner_E >= (self.num_devices + 1) // 2] = 0.0
        elif self.name == "L7":
            return np.asarray(self.owner_E == self._wanted_S()[:, None], dtype=np.float64)
        return weight_E

    def _wanted_S(self) -> IntArray:
        """L7: the rank whose experts each rank wants."""
        owners = np.unique(self.owner_E)
        away_S = (np.arange(self.num_devices) + self.num_devices // 2) % self.num_devices
        wanted_S: IntArray = owners[np.searchsorted(owners, away_S) % len(owners)]
        return wanted_S


def scenario(
    name: str,
    num_experts: int,
    num_devices: int,
    *,
    seed: int = 0,
    owner_E: IntArray | None = None,
    trace: LoadTrace | None = None,
    layer: int = 0,
) -> Scenario:
    """One of the scenarios L0 to L8 for one layer.

    Args:
        name: L0 to L8.
        num_experts: E.
        num_devices: D; every device is a source.
        seed: Deals the experts, and draws the rows.
        owner_E: int64 [E], who owns the experts before any resharding; by default as expert parallelism has it.
        trace: The load that L8 replays.
        layer: The layer of the trace that it replays.

    Raises:
        PlacementError: The name is unknown, no expert of L6 is left with load, or L8 has no trace, or one that does not
            have this layer, number of experts or number of sources, or a step in which a source has no rows.
    """
    if name not in SCENARIOS:
        raise PlacementError(f"load scenario {name!r} is unknown; use one of {', '.join(SCENARIOS)}")
    owner_E = own_evenly(1, num_experts, num_devices)[0] if owner_E is None else owner_E
    if name == "L6" and owner_E.min() >= (num_devices + 1) // 2:
        raise PlacementError("load scenario L6 takes all load from the upper half of the ranks, which own all experts")
    if name != "L8":
        return Scenario(name, owner_E, num_devices, seed)
    if trace is None:
        raise PlacementError("load scenario L8 replays a recorded load: give it a trace")
    return Scenario(name, owner_E, num_devices, seed, _replayed(trace, layer, num_experts, num_devices))


def _replayed(trace: LoadTrace, layer: int, num_experts: int, num_devices: int) -> FloatArray:
    if trace.num_experts != num_experts or not 0 <= layer < trace.num_layers:
        raise PlacementError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, and layer {layer} of "
            f"{num_experts} experts was asked for"
        )
    if trace.load_NLSE is None:
        replayed_NSE = trace.load_NLE[:, layer, None]
    else:
        replayed_NSE = trace.load_NLSE[:, layer]
        if replayed_NSE.shape[1] != num_devices:
            raise PlacementError(f"the trace has {replayed_NSE.shape[1]} sources, but {num_devices} were asked for")
    if not len(replayed_NSE) or (replayed_NSE.sum(axis=2) == 0).any():
        raise PlacementError(f"the trace has no step, or one in which a source has no rows in layer {layer}")
    return replayed_NSE.astype(np.float64)

"""Random placements, loads and devices for the planners' tests, and linear programs that know the best answer."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from sparsetrain.moe.placement import Placement, Topology, own_evenly
from sparsetrain.moe.placement.topology import IntArray


@dataclass(frozen=True)
class Problem:
    """One layer to be planned."""

    topology: Topology
    owner_E: IntArray
    counts_SE: IntArray
    slots: int
    hot: int | None

    @property
    def load_E(self) -> IntArray:
        return self.counts_SE.sum(axis=0)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    num_devices = draw(st.integers(1, 9))
    return Topology(num_devices, draw(st.integers(1, num_devices + 1)))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Few experts or many, owned evenly or anyhow; loads from nothing at all to everything on one expert."""
    topology = draw(topologies())
    num_devices, num_experts = topology.num_devices, draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        owner_E = own_evenly(1, num_experts, num_devices)[0]
    else:
        owner_E = generator.integers(0, num_devices, num_experts)
    shape, largest = (num_devices, num_experts), draw(st.sampled_from([1, 3, 1000]))
    kind = draw(st.sampled_from(["alike", "skewed", "one expert", "one source", "nothing"]))
    counts_SE = generator.integers(0, largest + 1, shape)
    if kind == "skewed":
        counts_SE = counts_SE * generator.integers(1, 50, num_experts) // 7
    elif kind == "one expert":
        counts_SE[:, np.arange(num_experts) != generator.integers(num_experts)] = 0
    elif kind == "one source":
        counts_SE[np.arange(num_devices) != generator.integers(num_devices)] = 0
    elif kind == "nothing":
        counts_SE[:] = 0
    hot = draw(st.none() | st.integers(0, num_experts))
    return Problem(topology, owner_E, counts_SE, draw(st.integers(0, 3)), hot)


@st.composite
def placed(draw: st.DrawFn) -> tuple[Problem, Placement]:
    """A problem with any replicas, not necessarily sensible ones."""
    problem = draw(problems())
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (len(problem.owner_E), problem.topology.num_devices)
    holders_ED = generator.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    holders_ED[np.arange(shape[0]), problem.owner_E] = True
    return problem, Placement(problem.owner_E, holders_ED)


def least_peak(load_E: IntArray, placement: Placement) -> float:
    """Rows of the fullest device in the best of all splits, fractions of rows allowed."""
    num_pairs, num_devices = len(placement.expert_P), placement.num_devices
    pair_P, one_P = np.arange(num_pairs), np.ones(num_pairs)
    below_peak = _matrix(
        np.concatenate([one_P, -np.ones(num_devices)]),
        np.concatenate([placement.device_P, np.arange(num_devices)]),
        np.concatenate([pair_P, np.full(num_devices, num_pairs)]),
        (num_devices, num_pairs + 1),
    )
    complete = _matrix(one_P, placement.expert_P, pair_P, (placement.num_experts, num_pairs + 1))
    cost = np.zeros(num_pairs + 1)
    cost[-1] = 1
    return float(linprog(cost, below_peak, np.zeros(num_devices), complete, load_E, method="highs").fun)


def least_crossing(counts_SE: IntArray, placement: Placement, topology: Topology, capacity: int) -> float:
    """The fewest rows that cross nodes in any split that leaves no device with more than the capacity."""
    num_pairs, num_experts = len(placement.expert_P), placement.num_experts
    wanted_NE = np.add.reduceat(counts_SE, topology.first_of_node_N, axis=0)
    num_groups = wanted_NE.size
    pair_P, one_P, one_G = np.arange(num_pairs), np.ones(num_pairs), np.ones(num_groups)
    group_P = topology.node_D[placement.device_P] * num_experts + placement.expert_P
    # Variables: rows of each pair, then rows of each (node, expert) that find no holder in their node.
    below = _matrix(one_P, placement.device_P, pair_P, (placement.num_devices, num_pairs + num_groups))
    away = _matrix(
        np.concatenate([-one_P, -one_G]),
        np.concatenate([group_P, np.arange(num_groups)]),
        np.concatenate([pair_P, num_pairs + np.arange(num_groups)]),
        (num_groups, num_pairs + num_groups),
    )
    complete = _matrix(one_P, placement.expert_P, pair_P, (num_experts, num_pairs + num_groups))
    limits = np.concatenate([np.full(placement.num_devices, capacity), -wanted_NE.ravel()])
    cost = np.concatenate([np.zeros(num_pairs), one_G])
    load_E = counts_SE.sum(axis=0)
    return float(linprog(cost, vstack([below, away]), limits, complete, load_E, method="highs").fun)


def _matrix(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> coo_array:
    return coo_array((values, (rows, columns)), shape=shape)

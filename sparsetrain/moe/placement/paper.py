"""Sparse materialisation and heterogeneous sharding as arXiv 2502.02581 (Hecate) publishes them: the baseline.

Where the text leaves a choice open: an expert gets its share of the slots that are left, rounded to the nearest; a
replica goes to the node with the fewest holders of its expert, and there to the device with the least load, an expert's
rows counted in equal shares at its holders. Of the readings tried, this one comes closest to the balance known of it.
"""

import numpy as np

from sparsetrain.moe.placement.topology import BoolArray, FloatArray, IntArray, Topology


def materialise_by_share(
    load_E: FloatArray, owner_E: IntArray, topology: Topology, *, slots: int, hot: int
) -> BoolArray:
    """Give the hottest experts replicas in proportion to their load, spread over nodes (sparse materialisation).

    With t = `hot` and m = min(`slots`, t): if t ≤ m the top t experts go everywhere; else the D·m slots are dealt to
    the top t experts, by descending load.

    Returns:
        bool [E, D], who holds what, owners included.
    """
    num_experts, num_devices = len(load_E), topology.num_devices
    holders_ED = np.zeros((num_experts, num_devices), dtype=np.bool_)
    holders_ED[np.arange(num_experts), owner_E] = True
    hot = min(hot, num_experts)
    top = np.argsort(-load_E, kind="stable")[:hot]
    if hot <= slots:
        holders_ED[top] = True
        return holders_ED
    free_D = np.full(num_devices, slots)
    load_D: FloatArray = np.bincount(owner_E, load_E, num_devices).astype(np.float64)
    slots_left, load_left = num_devices * slots, float(load_E[top].sum())
    for expert in top.tolist():
        if load_left <= 0:
            break
        wanted = min(round(slots_left * load_E[expert] / load_left), num_devices - 1)
        load_left -= float(load_E[expert])
        devices = _spread(holders_ED[expert], wanted, free_D, load_D, topology)
        share = load_E[expert] / (1 + len(devices))
        load_D[owner_E[expert]] -= load_E[expert] - share
        load_D[devices] += share
        free_D[devices] -= 1
        holders_ED[expert, devices] = True
        slots_left -= len(devices)
    return holders_ED


def _spread(held_D: BoolArray, count: int, free_D: IntArray, load_D: FloatArray, topology: Topology) -> IntArray:
    """Devices for so many replicas, fewer if slots run out: nodes with the fewest holders first, then least load."""
    candidate_D = np.flatnonzero((free_D > 0) & ~held_D)
    candidate_D = candidate_D[np.lexsort((load_D[candidate_D], topology.node_D[candidate_D]))]
    node_D = topology.node_D[candidate_D]
    holders_N = np.bincount(topology.node_D[held_D], minlength=topology.num_nodes)
    # A node's n-th candidate is taken when the node has n holders more than now.
    first_N = np.searchsorted(node_D, np.arange(topology.num_nodes))
    turn_D = holders_N[node_D] + np.arange(len(node_D)) - first_N[node_D]
    return candidate_D[np.lexsort((load_D[candidate_D], turn_D))[:count]]


def shard_heterogeneously(load_LE: FloatArray, owners_LE: IntArray, topology: Topology, *, hot: int) -> IntArray:
    """New owners, so that what is left after materialising the top `hot` experts is even (heterogeneous sharding).

    Layers by descending maximum load of an expert outside their top `hot`; their experts outside it by descending load,
    each to the least loaded node, then device, that has a free slot, loads counted per layer; the top experts fill the
    slots that are left. A device keeps the number of experts that it owns over all layers together.

    Returns:
        int64 [L, E].
    """
    num_layers, num_experts = load_LE.shape
    free_D = np.bincount(owners_LE.ravel(), minlength=topology.num_devices)
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    hot = min(hot, num_experts)
    hottest_rest_L = np.sort(load_LE, axis=1)[:, -1 - hot] if hot < num_experts else np.zeros(num_layers)
    layers = np.argsort(-hottest_rest_L, kind="stable").tolist()
    load_LD = np.zeros((num_layers, topology.num_devices))
    shards_LE = np.empty_like(owners_LE)
    for part in (slice(hot, None), slice(0, hot)):
        for layer in layers:
            for expert in order_LE[layer, part].tolist():
                device = _least_loaded(load_LD[layer], free_D, topology)
                shards_LE[layer, expert] = device
                load_LD[layer, device] += load_LE[layer, expert]
                free_D[device] -= 1
    return shards_LE


def _least_loaded(load_D: FloatArray, free_D: IntArray, topology: Topology) -> int:
    """The device with the least load that has a free slot, in the node with the least load a device that has any."""
    first_N = topology.first_of_node_N
    load_N = np.add.reduceat(load_D, first_N) / np.diff(first_N, append=len(load_D))
    load_N[np.maximum.reduceat(free_D, first_N) == 0] = np.inf
    node = int(load_N.argmin())
    return int(np.where((free_D > 0) & (topology.node_D == node), load_D, np.inf).argmin())

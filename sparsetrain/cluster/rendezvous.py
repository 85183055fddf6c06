"""How the ranks of a run find one another: one network interface a node, the one that Ray itself speaks over.

Left to themselves gloo takes whatever the host's name resolves to (often loopback, on which other nodes are never
found) and NCCL any interface that is up (often a container's bridge).
"""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray  # isort: skip  # it has psutil in a folder of its own, and adds that to the path
import psutil  # isort: skip

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from sparsetrain.cluster.events import put_events
from sparsetrain.errors import ClusterError
from sparsetrain.training.events import Notice

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MAX_NODES_SHOWN = 4


def interface_of(address: str) -> str | None:
    """The network interface that has an IP address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    return None


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    """Ray's id of the node; several nodes may share a machine."""
    address: str
    interface: str


def take_place() -> Place:
    """Tell gloo and NCCL which interface to use, unless the person has, and the model which node it runs on.

    Raises:
        ClusterError: No interface of this node has the address that Ray knows it by.
    """
    from sparsetrain.parallel.fssdp.groups import NODE_VARIABLE  # late: Ray Train's controller needs none of it

    address = str(ray.util.get_node_ip_address())
    interface = interface_of(address)
    if interface is None and any(name not in os.environ for name in INTERFACE_VARIABLES):
        raise ClusterError(
            f"node {address} ({socket.gethostname()}): no network interface has this address, by which Ray knows the "
            f"node. Start Ray there with --node-ip-address, or set {' and '.join(INTERFACE_VARIABLES)}."
        )
    for name in INTERFACE_VARIABLES:
        os.environ.setdefault(name, interface or "")
    node = str(ray.get_runtime_context().get_node_id())
    os.environ[NODE_VARIABLE] = node
    return Place(node, address, os.environ[INTERFACE_VARIABLES[0]])


def describe_places(places: Sequence[Place]) -> str:
    """Say how ranks are spread over nodes and over which interfaces they speak; `places` is in order of rank."""
    per_node = Counter(place.node for place in places)
    address_of = {place.node: place.address for place in places}
    interfaces = " and ".join(sorted({place.interface for place in places}))
    nodes = ", ".join(f"{count} on {address_of[node]}" for node, count in list(per_node.items())[:MAX_NODES_SHOWN])
    more = f" and {len(per_node) - MAX_NODES_SHOWN} more" if len(per_node) > MAX_NODES_SHOWN else ""
    return f"{len(places)} ranks on {len(per_node)} nodes ({nodes}{more}), connected over {interfaces}"


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray is untyped
    def on_start(self, worker_group: Any, backend_config: "Rendezvous") -> None:
        """Choose interfaces, say which, and connect the ranks; runs on Ray Train's controller."""
        places = worker_group.execute(take_place)
        if len({place.node for place in places}) > 1:
            put_events(backend_config.hub, [Notice(describe_places(places))])
        super().on_start(worker_group, backend_config)


@dataclass
class Rendezvous(TorchConfig):  # type: ignore[misc]  # Ray is untyped
    """Connects the ranks as Ray's own config does, over chosen interfaces."""

    hub: Any = None
    """Actor that takes events."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What connects the ranks."""
        return _Backend

"""The ranks among which experts are spread, and those that hold the same experts."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from sparsetrain.errors import ShardingError
from sparsetrain.moe.placement import Topology

_kept: set[ProcessGroup] = set()
"""Groups made here live as long as the process: the last one to let go of a group joins its threads while it holds
Python's global lock, and a thread that wants the lock at that moment never ends."""

NODE_VARIABLE = "SPARSETRAIN_NODE"
"""Environment variable that names the node of a rank, where hosts' names do not: several may share a machine."""


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """One rank's view of a layout of experts.

    Tokens and parameters have groups of their own, so that neither can be mixed up with the other or with the
    collectives of a data-parallel wrapper, whatever the order in which ranks come to issue them; on a GPU each group
    has a stream of its own, on which it overlaps with computation.
    """

    experts: ProcessGroup
    """The ranks that hold every expert once between them; for tokens."""
    parameters: ProcessGroup
    """The same ranks; for weights, their gradients and optimizer state."""
    replicate: ProcessGroup | None
    """The ranks of other expert groups that own the same experts as this one; None where there is one group only."""
    world_size: int
    """Data-parallel ranks, over which gradients are averaged: expert groups times ranks of each."""
    topology: Topology
    """Of the ranks of an expert group."""

    @property
    def size(self) -> int:
        """Ranks of an expert group, D."""
        return self.topology.num_devices

    @property
    def rank(self) -> int:
        """This rank's place in its expert group."""
        return dist.get_rank(self.experts)

    @property
    def num_groups(self) -> int:
        """How many expert groups there are."""
        return self.world_size // self.size

    @property
    def replica_rank(self) -> int:
        """Which of the expert groups this is."""
        return 0 if self.replicate is None else dist.get_rank(self.replicate)

    @classmethod
    def of_mesh(
        cls, mesh: DeviceMesh, *, timeout: timedelta | None = None, devices_per_node: int | None = None
    ) -> "ExpertGroups":
        """Make the groups of a mesh; collective over its ranks.

        Args:
            mesh: Of one dimension: all its ranks are one expert group. Of two: each row is one, [replicate, experts].
            timeout: How long a collective waits for a rank that does not come; default: torch's.
            devices_per_node: Ranks of an expert group that stand in one node; default: what their hosts' names say.

        Raises:
            ShardingError: The mesh has other dimensions, or not this rank; or a host's ranks do not follow one another.
        """
        if mesh.ndim not in (1, 2):
            raise ShardingError(
                f"a mesh of {mesh.ndim} dimensions, {mesh.mesh_dim_names or tuple(mesh.shape)}, does not say which "
                "ranks share the experts: pass one of one dimension, or of two, [replicate, experts]"
            )
        if mesh.get_coordinate() is None:
            raise ShardingError(
                f"rank {dist.get_rank()} is none of the mesh's ranks {mesh.mesh.flatten().tolist()}: call this on "
                "those ranks alone, or pass a mesh of all"
            )
        rows = mesh.mesh.view(-1, mesh.size(mesh.ndim - 1)).tolist()
        return cls.of_rows(rows, timeout=timeout, devices_per_node=devices_per_node)

    @classmethod
    def of_rows(
        cls, rows: list[list[int]], *, timeout: timedelta | None = None, devices_per_node: int | None = None
    ) -> "ExpertGroups":
        """As `of_mesh`, of the ranks of each expert group, all groups equally large; collective over these ranks."""
        columns = [list(column) for column in zip(*rows, strict=True)] if len(rows) > 1 else []
        world_size = sum(map(len, rows))
        # Where these are not all ranks of the world, the others do not take part in making the groups.
        alone = world_size < dist.get_world_size()
        experts = _own_group(rows, timeout, alone)
        parameters = _own_group(rows, timeout, alone)
        replicate = _own_group(columns, timeout, alone) if columns else None
        per_node = devices_per_node or _devices_per_node(experts)
        return cls(experts, parameters, replicate, world_size, Topology(len(rows[0]), per_node))


def _own_group(groups: list[list[int]], timeout: timedelta | None, alone: bool) -> ProcessGroup:
    """Make all groups, in the same order on every rank, and return the one that this rank is in."""
    own: ProcessGroup | None = None
    for ranks in groups:
        if dist.get_rank() in ranks:
            own = dist.new_group(ranks, timeout=timeout, use_local_synchronization=alone)
        elif not alone:
            dist.new_group(ranks, timeout=timeout)
    assert own is not None, (dist.get_rank(), groups)
    _kept.add(own)
    return own


def _devices_per_node(group: ProcessGroup) -> int:
    hosts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, os.environ.get(NODE_VARIABLE) or socket.gethostname(), group=group)
    per_node = hosts.count(hosts[0])
    nodes = [set(hosts[first : first + per_node]) for first in range(0, len(hosts), per_node)]
    if any(len(node) > 1 for node in nodes) or len(set(hosts)) < len(nodes):
        raise ShardingError(
            f"the ranks of an expert group are on the hosts {hosts} in this order: give ranks of one host consecutive "
            "numbers and hosts equally many, or pass devices_per_node"
        )
    return per_node

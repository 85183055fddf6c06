"""The group of ranks that this process belongs to, and the device it computes on."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from sparsetrain.config import RunConfig
from sparsetrain.errors import ClusterError

_kept_groups: set[dist.ProcessGroup | None] = set()
"""Groups that this process has trained in, kept to its end. Otherwise DDP's reducer can be the last to hold one: it
ends the group's thread without letting go of Python's global lock, and waits for ever if that thread wants it."""


@dataclass(frozen=True)
class World:
    """Who this rank is among how many, and where it computes."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta | None = None
    """How long a collective waits for a rank that does not come; None: torch's default."""
    inner: int = 1
    """Consecutive ranks that read the same samples: they share matrices, or the tokens of a sample."""
    stages: int = 1
    """Contiguous blocks of ranks, of which each does a part of the layers."""

    @property
    def num_shares(self) -> int:
        """Into how many shares a batch is cut: one for each copy of the model."""
        return self.size // (self.inner * self.stages)

    @property
    def share(self) -> int:
        """Which of them this rank reads."""
        return self.rank // self.inner % self.num_shares

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all: it writes metrics and reports."""
        return self.rank == 0

    def mesh(self, shard_size: int) -> DeviceMesh:
        """Ranks as copies x parts: `replicate` copies of the weights, each spread over `shard` consecutive ranks."""
        ranks = torch.arange(self.size).view(-1, shard_size)
        # Not init_device_mesh: its groups would wait for as long as torch does by default, not as the run does.
        groups = [self._own_group(ranks.mT.tolist()), self._own_group(ranks.tolist())]
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=("replicate", "shard"))

    def _own_group(self, groups: list[list[int]]) -> dist.ProcessGroup:
        """Make groups of ranks, in the same order on all; collective. Returns the one that this rank is in."""
        own: dist.ProcessGroup
        own, _ = dist.new_subgroups_by_enumeration(groups, timeout=self.timeout)  # type: ignore[no-untyped-call]
        return own

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the ranks that a launcher started (a Ray worker's group, torchrun's environment), or be alone.

    A process group that is already there is used and left as it is; one that is made here is taken down again.

    Raises:
        ClusterError: GPUs are asked for and there are none, or fewer than ranks; or the ranks cannot meet.
    """
    device = _device(config)
    made_here = not dist.is_initialized() and _needs_group(config)
    if made_here:
        _init_process_group(config, device)
    try:
        if dist.is_initialized():
            _kept_groups.add(dist.group.WORLD)
            timeout = timedelta(seconds=config.cluster.collective_timeout_s)
            layout = config.parallel
            yield World(
                dist.get_rank(), dist.get_world_size(), device, timeout, inner=layout.tp * layout.cp, stages=layout.pp
            )
        else:
            yield World(0, 1, device)
    finally:
        if made_here:
            dist.destroy_process_group()
            # It holds meshes whose groups are gone, and takes a mesh of a later world for one of them.
            _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


def _needs_group(config: RunConfig) -> bool:
    # fully_shard and experts need a mesh, and a mesh a process group, also for one rank; and so do the libraries.
    parallel = config.parallel
    needs_one = parallel.shard == "full" or parallel.experts is not None or parallel.engine != "torch"
    return "WORLD_SIZE" in os.environ or needs_one


def _init_process_group(config: RunConfig, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.cluster.collective_timeout_s)
    if "WORLD_SIZE" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ClusterError(
                f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT = {where}: {str(error).splitlines()[0]}. Name a "
                "port that is free (torchrun --standalone finds one), and the same address on every rank"
            ) from error
    else:
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1, timeout=timeout)


def _device(config: RunConfig) -> torch.device:
    if config.cluster.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g}, and this process sees no CUDA device; "
            "set it to 0 to train on the CPU, or install a CUDA build of torch on a machine with a GPU"
        )
    local_rank, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ClusterError(
            f"rank {local_rank} of this machine has no GPU: it has {num_devices}; start {num_devices} ranks at most"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device

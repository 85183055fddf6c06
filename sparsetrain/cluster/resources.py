"""Is there room for the workers? Asked before anything starts, answered in seconds."""

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from sparsetrain.config import ClusterConfig
from sparsetrain.errors import ClusterError

_POLL_EVERY_S = 1.0
_COUNT_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 2.0
_LOSS_TIMEOUT_S = 30.0
"""Ray takes a node for gone when it has not answered some five times in a row: after a quarter of a minute."""


@dataclass(frozen=True)
class Request:
    """What the run asks of a cluster."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    min_workers: int | None = None

    @classmethod
    def from_config(cls, cluster: ClusterConfig) -> "Request":
        """Read it from the `cluster` section."""
        return cls(cluster.workers, cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.min_workers)

    @property
    def least(self) -> "Request":
        """The least that the run starts with."""
        return replace(self, workers=self.min_workers or self.workers)

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of one worker, in Ray's names."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    @property
    def num_cpus(self) -> int:
        """Whole CPUs for all workers."""
        return math.ceil(self.workers * self.cpus_per_worker)

    @property
    def num_gpus(self) -> int:
        """Whole GPUs for all workers."""
        return math.ceil(self.workers * self.gpus_per_worker)

    def fitting(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers fit on nodes with these resources."""
        return sum(min(int(node.get(name, 0) / each) for name, each in self.per_worker.items()) for node in nodes)


def check_machine(request: Request, *, cpus: float | None = None, gpus: int | None = None) -> None:
    """Refuse a local run that asks for more than this machine has.

    Args:
        request: What the run asks for.
        cpus: CPUs that this process may use; default counted.
        gpus: GPUs of this machine; default counted, when the run asks for some.

    Raises:
        ClusterError: Too few CPUs or GPUs.
    """
    import torch  # late, because whoever only submits a run needs none

    from sparsetrain.planning.hardware import usable_cores

    machine = {"CPU": usable_cores() if cpus is None else cpus, "GPU": 0.0}
    if request.gpus_per_worker:
        machine["GPU"] = torch.cuda.device_count() if gpus is None else gpus
    if request.fitting([machine]) < request.workers:
        raise ClusterError(shortage(request, [machine], "this machine has"))


def wait_for_cluster(request: Request, *, timeout_s: float, notify: Callable[[str], None]) -> None:
    """Wait until the cluster that this process has joined has room for the workers.

    A cluster without an autoscaler whose nodes are too small is refused at once; one that is busy, or may still grow,
    is given `timeout_s` seconds.

    Args:
        request: What the run asks for.
        timeout_s: Seconds to wait for busy or growing nodes.
        notify: Told once, when there is something to wait for.

    Raises:
        ClusterError: Too few CPUs or GPUs.
    """
    deadline = time.monotonic() + timeout_s
    waiting = False
    while (free := request.fitting(available_resources_per_node().values())) < request.workers:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if request.fitting(nodes) < request.workers and not _may_grow():
            free_of = available_resources_per_node().values()
            raise ClusterError(shortage(request, nodes, "the cluster has", free=free_of))
        if time.monotonic() >= deadline:
            message = shortage(request, available_resources_per_node().values(), "free are")
            raise ClusterError(
                f"{message} Or raise cluster.start_timeout_s={timeout_s:g}, and wait for what else runs there to end."
            )
        if not waiting:
            notify(f"the cluster has room for {free} of {request.workers} workers; waiting up to {timeout_s:g} s")
            waiting = True
        time.sleep(min(_POLL_EVERY_S, max(0.0, deadline - time.monotonic())))


def count_nodes_anew() -> None:
    """Let Ray Train see the nodes that the cluster has now.

    Its elastic runs begin with as many workers as fit on the nodes that an actor of Ray's counted last. That actor
    outlives runs and counts every 20 s: without this, a run would begin without nodes that have just joined.
    """
    name = "AutoscalingCoordinator"
    # There may be none yet, and one that starts counts at once; or it was on a node that is lost, or busy. A run then
    # begins with the nodes of the last count.
    with contextlib.suppress(ValueError, AttributeError, TypeError, RayError):
        coordinator = ray.get_actor(name, namespace=name)
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=_COUNT_TIMEOUT_S)


def forget_lost_nodes() -> None:
    """Wait until Ray, too, takes the nodes that no longer answer for gone, and let Ray Train see what is left.

    Ray notices late that a node has died. Until then an elastic run would be started again for that node as well, and
    would wait in vain for the workers there.
    """
    deadline = time.monotonic() + _LOSS_TIMEOUT_S
    while not all(map(_answers, (node for node in ray.nodes() if node["Alive"]))) and time.monotonic() < deadline:
        time.sleep(_POLL_EVERY_S)
    count_nodes_anew()


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether Ray still listens on a node."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _may_grow() -> bool:
    """Whether an autoscaler could add nodes."""
    return ray._private.state.state.get_max_resources_from_cluster_config() is not None


def shortage(
    request: Request,
    nodes: Iterable[Mapping[str, float]],
    has: str,
    *,
    free: Iterable[Mapping[str, float]] | None = None,
) -> str:
    """Say what is asked for, what there is, and how to come to terms.

    Args:
        request: What the run asks for.
        nodes: Resources of each node.
        has: Begins the part of the sentence about the nodes.
        free: What of each node's resources nobody uses.
    """
    nodes, free = list(nodes), None if free is None else list(free)
    asked, needs, total = [], [], []
    for name, each in request.per_worker.items():
        asked.append(f"cluster.{name.lower()}s_per_worker={each:g}")
        needs.append(_amount(request.workers * each, name))
        unused = "" if free is None else f" ({sum(node.get(name, 0) for node in free):g} free)"
        total.append(_amount(sum(node.get(name, 0) for node in nodes), name) + unused)
    on = "" if len(nodes) == 1 else f" on {len(nodes)} nodes"
    fitting = request.fitting(nodes)
    fix = f"lower cluster.workers to {fitting}" if fitting else "lower what each worker asks for"
    return (
        f"cluster.workers={request.workers} with {' and '.join(asked)} asks for {' and '.join(needs)}; "
        f"{has} {' and '.join(total)}{on}. To fix: {fix}, or use a larger machine or cluster."
    )


def _amount(count: float, name: str) -> str:
    return f"{count:g} {name}{'' if count == 1 else 's'}"

"""A checkup of a cluster: does every node have what a run needs, and the same of it as the others?"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsetrain.cluster import node_probe
from sparsetrain.cluster.head import check_head
from sparsetrain.cluster.resources import Request
from sparsetrain.cluster.session import ray_session, resolve_address
from sparsetrain.errors import ClusterError

_ANSWER_TIMEOUT_S = 60.0
"""A node answers within seconds; one whose CPUs are all busy first has to start Python and import torch."""
_CLOCK_SAMPLES = 5
_LARGEST_CLOCK_SKEW_S = 1.0
"""More, and the times in logs and checkpoints of different nodes cannot be put in order."""
_FIXES = {
    "python": "start Ray there with the same Python",
    "ray": "install the same Ray there",
    "torch": "install the same torch there",
    "cuda": "install torch's build for the same CUDA there",
    "sparsetrain": "install the same sources there; a run that is submitted brings its own",
}


@dataclass(frozen=True)
class NodeReport:
    """What a node said about itself."""

    name: str
    """Its address and its host's name."""
    interface: str
    """The network interface that has this address; empty where none has."""
    versions: dict[str, str]
    cpus: float
    gpus: int
    """GPUs that torch sees."""
    gpus_of_ray: float
    """GPUs that Ray hands out there."""
    gpu_name: str
    clock_skew_s: float
    """How far its clock is ahead of this machine's."""
    clock_error_s: float
    """How wrong that may be."""
    cannot_reach: str
    """Why it cannot connect to the first node; empty where it can."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a node, and what helps."""

    node: str
    what: str
    fix: str


def check_cluster(address: str | None, console: Console) -> bool:
    """Look at all nodes of a cluster at once, print what they have and what is wrong; returns whether all is well.

    Args:
        address: host:port of a cluster, or auto; default as for `train`.
        console: Where to print.

    Raises:
        ClusterError: There is no such cluster.
    """
    address = resolve_address(address, "auto")
    check_head(address)
    with ray_session(address, Request(1, 0, 0), env_vars={}):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        with _probes(nodes) as probes:
            reports, problems = _question(nodes, probes)
    problems += find_problems(reports)
    _print(reports, problems, console)
    return not problems


def find_problems(reports: Sequence[NodeReport]) -> list[Problem]:
    """What would break a run, or make one hard to understand, node by node."""
    problems = []
    for key, fix in _FIXES.items():
        common = Counter(report.versions[key] for report in reports).most_common(1)
        for report in reports:
            if report.versions[key] != common[0][0]:
                what = f"{key} is {report.versions[key] or 'none'}, and {common[0][0] or 'none'} on most nodes"
                problems.append(Problem(report.name, what, fix))
            elif report.versions[key] == "missing":
                problems.append(Problem(report.name, f"{key} is missing", fix))
    for report in reports:
        problems += _problems_of(report)
    return problems


def _problems_of(report: NodeReport) -> Iterator[Problem]:
    if report.gpus < report.gpus_of_ray:
        yield Problem(
            report.name,
            f"Ray hands out {report.gpus_of_ray:g} GPUs, and torch sees {report.gpus}",
            "look at nvidia-smi there: the driver, a GPU that fell off the bus, or a CPU build of torch",
        )
    if abs(report.clock_skew_s) - report.clock_error_s > _LARGEST_CLOCK_SKEW_S:
        side = "ahead of" if report.clock_skew_s > 0 else "behind"
        yield Problem(
            report.name,
            f"its clock is {abs(report.clock_skew_s):.1f} s {side} this machine's",
            "let chrony or systemd-timesyncd set it",
        )
    if not report.interface:
        yield Problem(
            report.name,
            "no network interface has the address by which Ray knows the node",
            "start Ray there with --node-ip-address",
        )
    if report.cannot_reach:
        yield Problem(
            report.name,
            f"cannot connect to the first node: {report.cannot_reach}",
            "open all ports between the nodes: ranks connect to one another on ports that the system picks",
        )


@contextlib.contextmanager
def _probes(nodes: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    """An actor on each node; they take no CPU, and end here."""
    ray.cloudpickle.register_pickle_by_value(node_probe)
    try:
        remote = ray.remote(num_cpus=0)(node_probe.NodeProbe)
        probes = [
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
        yield probes
        for probe in probes:
            ray.kill(probe)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_probe)


def _question(nodes: Sequence[dict[str, Any]], probes: Sequence[Any]) -> tuple[list[NodeReport], list[Problem]]:
    """Ask all nodes at once; a node that does not answer is a problem."""
    silent: dict[int, Problem] = {}
    facts = _answers(
        nodes,
        {
            at: [probe.address.remote(), probe.versions.remote(), probe.gpus.remote(), probe.listen.remote()]
            for at, probe in enumerate(probes)
        },
        silent,
    )
    if not facts:
        raise ClusterError(f"no node of the cluster answers; the first one: {silent[0].node}, {silent[0].what}")
    place, *_, port = next(iter(facts.values()))
    reached = _answers(nodes, {at: [probes[at].reaches.remote(place["ip"], port)] for at in facts}, silent)
    reports = []
    for at, (cannot_reach,) in reached.items():
        try:
            skew, error = _clock_skew(probes[at])
        except (GetTimeoutError, RayError) as failure:
            silent[at] = _no_answer(nodes[at], failure)
            continue
        place, versions, gpus, _ = facts[at]
        reports.append(
            NodeReport(
                name=f"{place['ip']} ({place['host']})",
                interface=place["interface"],
                versions={**versions, "cuda": gpus["cuda"]},
                cpus=nodes[at]["Resources"].get("CPU", 0),
                gpus=gpus["count"],
                gpus_of_ray=nodes[at]["Resources"].get("GPU", 0),
                gpu_name=gpus["name"],
                clock_skew_s=skew,
                clock_error_s=error,
                cannot_reach=cannot_reach,
            )
        )
    return reports, list(silent.values())


def _answers(
    nodes: Sequence[dict[str, Any]], asked: Mapping[int, list[Any]], silent: dict[int, Problem]
) -> dict[int, list[Any]]:
    """The answers of the nodes that answer, and in `silent` what is wrong with the others, by index of the node."""
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    answers = {}
    for at, questions in asked.items():
        try:
            answers[at] = ray.get(questions, timeout=max(0.1, deadline - time.monotonic()))
        except (GetTimeoutError, RayError) as failure:
            silent[at] = _no_answer(nodes[at], failure)
    return answers


def _no_answer(node: Mapping[str, Any], failure: Exception) -> Problem:
    why = "it did not answer in time" if isinstance(failure, GetTimeoutError) else str(failure).splitlines()[0]
    name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
    return Problem(name, why, "look at Ray's logs there, and start Ray again")


def _clock_skew(probe: Any) -> tuple[float, float]:
    """How far a node's clock is ahead, and how wrong that may be: from the quickest of a few answers, in seconds."""
    samples = []
    for _ in range(_CLOCK_SAMPLES):
        asked = time.time()
        said = ray.get(probe.clock.remote(), timeout=10)
        answered = time.time()
        samples.append(((answered - asked) / 2, said - (asked + answered) / 2))
    error, skew = min(samples)
    return skew, error


def _print(reports: Sequence[NodeReport], problems: Sequence[Problem], console: Console) -> None:
    console.print(f"\n [bold]{len(reports)} node{'s' * (len(reports) > 1)}[/]")
    table = Table.grid(padding=(0, 2))
    for report in reports:
        gpus = f"{report.gpus} x {report.gpu_name}" if report.gpus else "no GPU"
        clock = f"clock {report.clock_skew_s * 1000:+.0f} ± {report.clock_error_s * 1000:.0f} ms"
        table.add_row(
            f"   {report.name}", report.interface or "no interface", f"{report.cpus:g} CPUs, {gpus}", f"[dim]{clock}[/]"
        )
    console.print(table)
    common = {key: Counter(report.versions[key] for report in reports).most_common(1)[0][0] for key in _FIXES}
    versions = ", ".join(f"{key} {value or 'none'}" for key, value in common.items())
    console.print(f"   [dim]{escape(versions)}[/]", soft_wrap=True)
    if not problems:
        console.print("\n [green]no problems found[/]")
        return
    console.print(f"\n [bold yellow]{'a problem' if len(problems) == 1 else f'{len(problems)} problems'}[/]")
    grid = Table.grid(padding=(0, 1))
    for problem in problems:
        grid.add_row(
            "   [yellow]![/]", f"[bold]{escape(problem.node)}[/] {escape(problem.what)}\n[dim]{problem.fix}[/]"
        )
    console.print(grid)

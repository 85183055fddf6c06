"""Training across the nodes of a Ray cluster: four Ray nodes on this machine, three of which can hold workers."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from sparsetrain.cluster import check_cluster, run_on_ray
from sparsetrain.cluster.packages import find_packages
from sparsetrain.cluster.session import FRUGAL
from sparsetrain.config import RunConfig, load_config
from sparsetrain.training import train
from sparsetrain.training.events import CheckpointSaved, Event, Notice, RunStarted
from sparsetrain.training.metrics import read_metrics

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own way to start nodes
]

CONFIG = Path(__file__).parents[2] / "configs" / "quick.yaml"
STEPS = 6
SMOOTH = "optimizer.eps=1e-3"
"""Adam divides by the gradient's size: where that is all rounding, an eps far above it keeps it from being blown up."""
SMALL = (
    "train.phases=[]",
    "train.eval_tokens=1Ki",
    "train.eval_every_steps=100",
    "train.sample_tokens=2",  # each takes a forward pass: over nodes, 200 take longer than the whole run before them
    "sparsity=[]",
    "data.seq_len=32",
    SMOOTH,
)
MOE = (
    "model.num_layers=1",
    *("train.batch_tokens=384", f"train.tokens={STEPS * 384}", "train.micro_batch_size=12"),
    "model.moe={num_experts: 12, top_k: 2, ffn_dim: 16}",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # A lost node is noticed after five checks in vain, three seconds apart by default. Slow answers still are answers.
    quick_to_notice = {"health_check_period_ms": 300}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {**FRUGAL, **quick_to_notice}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def config_of(folder: Path, *overrides: str) -> RunConfig:
    cache = f"data.cache={folder.parent / 'cache'}"
    return load_config(CONFIG, [*SMALL, *overrides, f"output={folder}", cache])


def run_and_watch(config: RunConfig, cluster: Cluster) -> list[Event]:
    events: list[Event] = []
    run_on_ray(config, address=cluster.address, reporter=events.append)
    return events


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.output))]


def same_in_one_process(folder: Path, *overrides: str) -> list[float]:
    config = config_of(folder, *overrides)
    train(config)
    return losses(config)


def nodes_of_ranks(config: RunConfig, count: int) -> list[str]:
    """What each rank's log says of its Ray node."""
    logs = Path(config.output) / "logs"
    return [
        re.findall(r"^node (\w+), \S+$", (logs / f"worker-{rank}.log").read_text(), re.M)[-1] for rank in range(count)
    ]


def test_a_checkup_sees_every_node_and_finds_nothing_wrong(cluster: Cluster) -> None:
    console = Console(file=io.StringIO(), width=200)
    assert check_cluster(cluster.address, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "4 nodes" in text
    assert text.count("2 CPUs, no GPU") == 3
    assert f"sources {find_packages().digest[:12]}" in text
    assert "no problems found" in text


@pytest.mark.parametrize(
    ("experts", "layout", "nodes"),
    [
        # A worker that asks for both CPUs of a node has it alone.
        pytest.param("ep", ("cluster.workers=3", "cluster.cpus_per_worker=2"), [1, 1, 1], id="ep-on-three-nodes"),
        pytest.param("fssdp", ("cluster.workers=6", "cluster.cpus_per_worker=1"), [2, 2, 2], id="fssdp-two-a-node"),
    ],
)
def test_experts_over_nodes_have_the_losses_of_one_process(
    cluster: Cluster, tmp_path: Path, experts: str, layout: tuple[str, ...], nodes: list[int]
) -> None:
    expected = same_in_one_process(tmp_path / "alone", *MOE)
    config = config_of(tmp_path / "run", *MOE, f"parallel.experts={experts}", *layout)
    events = run_and_watch(config, cluster)
    assert len(expected) == STEPS
    assert losses(config) == pytest.approx(expected, rel=5e-6)
    placed = nodes_of_ranks(config, config.cluster.workers)
    groups = [node for at, node in enumerate(placed) if at == 0 or placed[at - 1] != node]
    assert len(groups) == len(set(groups)), "the ranks of a node follow one another"
    assert [placed.count(node) for node in groups] == nodes, "workers are packed"
    (told,) = [event.message for event in events if isinstance(event, Notice) and "connected" in event.message]
    assert re.search(rf"^{len(placed)} ranks on {len(nodes)} nodes \({nodes[0]} on .*\), connected over \S+$", told)


def lose_a_node_at_the_first_checkpoint(config: RunConfig, cluster: Cluster) -> tuple[list[Event], str, dict[str, Any]]:
    """Train, killing one of the nodes that train meanwhile; returns the events, the node, and the run's summary.

    A worker takes a whole node. The driver may have joined the cluster through one of them: that one stays.
    """
    while len(cluster.worker_nodes) < 3:
        cluster.add_node(num_cpus=2)
    events: list[Event] = []
    killed: list[str] = []

    def watch(event: Event) -> None:
        events.append(event)
        if isinstance(event, CheckpointSaved) and not killed:
            of_driver = ray.get_runtime_context().get_node_id()
            killed.append(next(node for node in nodes_of_ranks(config, 2) if node != of_driver))
            (node,) = [node for node in cluster.worker_nodes if node.node_id == killed[0]]
            cluster.remove_node(node, allow_graceful=False)

    summary = run_on_ray(config, address=cluster.address, reporter=watch)
    return events, killed[0], summary


# Nine tenths of the steps come after the checkpoint at which a node is killed: that is early enough on any machine.
DENSE = (
    *("train.batch_tokens=384", f"train.tokens={50 * 384}", "checkpoint.every_steps=5"),
    "cluster.cpus_per_worker=2",
)


def test_a_run_whose_node_goes_away_resumes_on_another(cluster: Cluster, tmp_path: Path) -> None:
    expected = same_in_one_process(tmp_path / "alone", *DENSE)
    config = config_of(tmp_path / "run", *DENSE, "cluster.workers=2")
    events, killed, summary = lose_a_node_at_the_first_checkpoint(config, cluster)
    (warning,) = [event.message for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert re.search(r"worker rank \d (died|was on a node that died|lost its connection)", warning)
    first, second = started(events)
    before = events[: events.index(Notice(warning, "warning"))]
    saved = [event.step for event in before if isinstance(event, CheckpointSaved)]
    assert first.resumed_from_step is None
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= saved[-1], "no step is lost that was saved"
    assert killed not in nodes_of_ranks(config, 2)
    assert losses(config) == pytest.approx(expected, rel=5e-6)
    assert summary["final_loss"] == pytest.approx(expected[-1], rel=5e-6)


def test_an_elastic_run_goes_on_with_the_nodes_that_are_left(cluster: Cluster, tmp_path: Path) -> None:
    expected = same_in_one_process(tmp_path / "alone", *DENSE)
    config = config_of(tmp_path / "run", *DENSE, "cluster.workers=3", "cluster.min_workers=1")
    events, killed, _ = lose_a_node_at_the_first_checkpoint(config, cluster)
    first, second = started(events)
    assert (first.world_size, second.world_size) == (3, 2)
    assert second.resumed_from_step is not None
    assert killed not in nodes_of_ranks(config, 2)
    assert losses(config) == pytest.approx(expected, rel=5e-6)


def started(events: list[Event]) -> list[RunStarted]:
    return [event for event in events if isinstance(event, RunStarted)]

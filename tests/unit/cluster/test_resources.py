import socket
from unittest.mock import Mock

import pytest

from sparsetrain.cluster import resources
from sparsetrain.cluster.resources import Request, check_machine, forget_lost_nodes, wait_for_cluster
from sparsetrain.config import ClusterConfig
from sparsetrain.errors import ClusterError


@pytest.mark.parametrize(
    ("request_", "nodes", "fitting"),
    [
        pytest.param(Request(4, 1, 0), [{"CPU": 2.0}], 2, id="one-node"),
        pytest.param(Request(4, 2, 0), [{"CPU": 3.0}, {"CPU": 3.0}], 2, id="no-worker-spans-nodes"),
        pytest.param(Request(4, 0.5, 0), [{"CPU": 2.0}], 4, id="shared-cpus"),
        pytest.param(Request(4, 1, 1), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], 2, id="gpus"),
    ],
)
def test_workers_that_fit_on_nodes(request_: Request, nodes: list[dict[str, float]], fitting: int) -> None:
    assert request_.fitting(nodes) == fitting


def test_more_workers_than_cpus_names_key_number_and_fix() -> None:
    with pytest.raises(ClusterError) as error:
        check_machine(Request(8, 1, 0), cpus=2)
    message = str(error.value)
    for part in (
        "cluster.workers=8",
        "cluster.cpus_per_worker=1",
        "8 CPUs",
        "has 2 CPUs",
        "lower cluster.workers to 2",
    ):
        assert part in message


def test_missing_gpus_name_the_gpu_key() -> None:
    check_machine(Request(2, 1, 1), cpus=2, gpus=2)
    with pytest.raises(ClusterError, match=r"cluster.gpus_per_worker=1 asks for .* 2 GPUs; this machine has .* 0 GPUs"):
        check_machine(Request(2, 1, 1), cpus=2, gpus=0)


class FakeCluster:
    """Nodes with a total and with what is free at each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, free: list[float], may_grow: bool) -> None:
        self.now = 0.0
        looks = iter(free)
        latest = [0.0]

        def available() -> dict[str, dict[str, float]]:
            latest[0] = next(looks, latest[0])
            return {"node": {"CPU": latest[0]}}

        nodes = [{"Alive": True, "Resources": {"CPU": total}}, {"Alive": False, "Resources": {"CPU": 99.0}}]
        monkeypatch.setattr(resources.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(resources, "available_resources_per_node", available)
        monkeypatch.setattr(resources, "_may_grow", lambda: may_grow)
        monkeypatch.setattr(resources.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(resources.time, "sleep", self.pass_time)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


def test_a_cluster_that_is_too_small_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, total=4, free=[4], may_grow=False)
    with pytest.raises(ClusterError, match=r"cluster.workers=8.*the cluster has 4 CPUs.*lower cluster.workers to 4"):
        wait_for_cluster(Request(8, 1, 0), timeout_s=60, notify=lambda message: None)
    assert cluster.now == 0


def test_a_busy_cluster_is_waited_for_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, total=4, free=[1, 1, 1, 4], may_grow=False)
    said: list[str] = []
    wait_for_cluster(Request(4, 1, 0), timeout_s=60, notify=said.append)
    assert said == ["the cluster has room for 1 of 4 workers; waiting up to 60 s"]


@pytest.mark.parametrize("may_grow", [False, True], ids=["busy", "autoscaler"])
def test_waiting_ends_with_what_is_free(monkeypatch: pytest.MonkeyPatch, may_grow: bool) -> None:
    cluster = FakeCluster(monkeypatch, total=2 if may_grow else 4, free=[1], may_grow=may_grow)
    with pytest.raises(ClusterError, match=r"free are 1 CPU\..* to 1, .*cluster.start_timeout_s=5"):
        wait_for_cluster(Request(4, 1, 0), timeout_s=5, notify=lambda message: None)
    assert cluster.now == 5


def test_an_elastic_run_needs_room_for_its_fewest_workers() -> None:
    cluster = ClusterConfig(workers=4, min_workers=2, cpus_per_worker=1)
    request = Request.from_config(cluster)
    assert (request.workers, request.least.workers) == (4, 2)
    assert Request.from_config(ClusterConfig(workers=4)).least.workers == 4


@pytest.mark.parametrize(("noticed_after", "waited"), [(3, 3.0), (None, 30.0)], ids=["noticed", "never-noticed"])
def test_a_node_that_is_gone_is_waited_for_until_ray_has_noticed(
    monkeypatch: pytest.MonkeyPatch, noticed_after: int | None, waited: float
) -> None:
    clock = FakeCluster(monkeypatch, total=4, free=[4], may_grow=False)
    count = Mock()
    monkeypatch.setattr(resources, "count_nodes_anew", count)
    with socket.create_server(("127.0.0.1", 0)) as here, socket.socket() as deaf:  # it has a port, and does not listen
        deaf.bind(("127.0.0.1", 0))
        there, gone = here.getsockname()[1], deaf.getsockname()[1]

        def nodes() -> list[dict[str, object]]:
            place = {"Alive": True, "NodeManagerAddress": "127.0.0.1"}
            gone_is_alive = noticed_after is None or clock.now < noticed_after
            return [place | {"NodeManagerPort": there}, place | {"NodeManagerPort": gone, "Alive": gone_is_alive}]

        monkeypatch.setattr(resources.ray, "nodes", nodes)
        forget_lost_nodes()
    assert clock.now == waited
    assert count.call_count == 1

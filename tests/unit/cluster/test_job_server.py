import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from sparsetrain.cluster import job_server
from sparsetrain.cluster.job_server import JobServer
from sparsetrain.cluster.resources import Request
from sparsetrain.errors import ClusterError

TWO_NODES = {"a": {"CPU": [1.0, 4.0]}, "b": {"CPU": [0.0, 4.0], "GPU": [0.0, 1.0]}}


class Dashboard(ThreadingHTTPServer):
    """Answers as a head's dashboard does."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"/api/version": {"ray_version": ray.__version__}}
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def has_nodes(self, usage: dict[str, Any] | None, types: dict[str, str]) -> None:
        report = {"usageByNode": usage} if usage is not None else None
        status = {"loadMetricsReport": report, "autoscalerReport": {"nodeTypeMapping": types}}
        self.answers["/api/cluster_status"] = {"data": {"clusterStatus": status if usage is not None else None}}


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Dashboard)
        answer = self.server.answers.get(self.path)
        self.send_response(200 if answer is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_a_head_with_another_ray_is_refused_naming_both(dashboard: Dashboard) -> None:
    dashboard.answers["/api/version"] = {"ray_version": "2.31.0"}
    with pytest.raises(ClusterError, match=rf"runs Ray 2.31.0, and here is Ray {ray.__version__}: install ray==2.31.0"):
        JobServer(dashboard.url)


def test_what_is_no_job_server_is_refused(dashboard: Dashboard) -> None:
    dashboard.answers.clear()
    with pytest.raises(ClusterError, match="does not answer like a Ray job server"):
        JobServer(dashboard.url)


def test_a_server_that_falls_silent_is_given_up(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    server = JobServer(dashboard.url)
    monkeypatch.setattr(job_server, "_ANSWER_TIMEOUT_S", 0.05)
    silence = threading.Event()
    monkeypatch.setattr(Answer, "do_GET", lambda self: silence.wait(5))
    with pytest.raises(ClusterError, match="has stopped answering"):
        server.list()
    silence.set()


def test_a_token_that_is_refused_later_is_one_message_too(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AuthenticationError("no")

    server = JobServer(dashboard.url)
    monkeypatch.setattr(server.client, "list_jobs", refuse)
    with pytest.raises(ClusterError, match=f"{dashboard.url} (asks for|refuses)"):
        server.list()


def test_the_environment_names_the_server_and_the_port_has_a_default(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard.url)
    assert JobServer().address == dashboard.url
    monkeypatch.setattr(job_server, "check_reachable", lambda address: None)
    assert job_server._url("head.example") == "http://head.example:8265"
    assert job_server._url("https://head.example") == "https://head.example:443"


@pytest.mark.parametrize("address", ["ray://host:10001", "http://", "http://host:port", "http://host:99999"])
def test_an_address_that_is_no_url_of_a_job_server_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="is not a job server: expected http://host:8265"):
        JobServer(address)


def test_too_many_workers_are_refused_saying_what_is_there_and_free(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_server, "_COUNT_S", 0.0)
    dashboard.has_nodes(TWO_NODES, {"a": "node_a", "b": "node_b"})
    server = JobServer(dashboard.url)
    server.check_room(Request(4, cpus_per_worker=2, gpus_per_worker=0))
    with pytest.raises(ClusterError) as error:
        server.check_room(Request(2, cpus_per_worker=1, gpus_per_worker=1))
    assert "asks for 2 CPUs and 2 GPUs; the cluster has 8 CPUs (7 free) and 1 GPU (1 free) on 2 nodes" in str(
        error.value
    )
    assert "lower cluster.workers to 1" in str(error.value)


def test_a_node_that_has_just_joined_is_soon_counted(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def count_again(seconds: float) -> None:
        waited.append(seconds)
        dashboard.has_nodes(TWO_NODES, {"a": "node_a", "b": "node_b"})

    monkeypatch.setattr(job_server, "time", SimpleNamespace(monotonic=time.monotonic, sleep=count_again))
    dashboard.has_nodes({"a": TWO_NODES["a"]}, {"a": "node_a"})
    JobServer(dashboard.url).check_room(Request(8, cpus_per_worker=1, gpus_per_worker=0))
    assert len(waited) == 1


@pytest.mark.parametrize(
    ("usage", "types"),
    [
        pytest.param(TWO_NODES, {"a": "head", "b": "gpu_worker"}, id="may-grow"),
        pytest.param(None, {}, id="not-counted-yet"),
    ],
)
def test_a_cluster_that_may_have_room_later_is_asked_later(
    dashboard: Dashboard, usage: dict[str, Any] | None, types: dict[str, str]
) -> None:
    dashboard.has_nodes(usage, types)
    JobServer(dashboard.url).check_room(Request(100, cpus_per_worker=1, gpus_per_worker=1))

import io
import socket
import time
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError
from rich.console import Console

from sparsetrain.cluster import checkup
from sparsetrain.cluster.checkup import NodeReport, _print, find_problems
from sparsetrain.cluster.node_probe import NodeProbe
from sparsetrain.cluster.packages import find_packages
from sparsetrain.errors import ClusterError

SAME = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "sparsetrain": "sources 0123456789ab", "cuda": "13.0"}
GOOD = NodeReport("10.0.0.1 (a)", "eth0", SAME, 8, 2, 2, "H100", 0.01, 0.001, "")
NODES = [GOOD, replace(GOOD, name="10.0.0.2 (b)"), replace(GOOD, name="10.0.0.3 (c)")]


def test_nodes_that_are_alike_have_no_problems() -> None:
    assert find_problems(NODES) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"versions": {**SAME, "torch": "2.11.0"}}, "torch is 2.11.0, and 2.13.0 on most nodes"),
        ({"versions": {**SAME, "cuda": ""}}, "cuda is none, and 13.0 on most nodes"),
        (
            {"versions": {**SAME, "sparsetrain": "missing"}},
            "sparsetrain is missing, and sources 0123456789ab on most nodes",
        ),
        ({"gpus": 1}, "Ray hands out 2 GPUs, and torch sees 1"),
        ({"clock_skew_s": -90.0}, "its clock is 90.0 s behind this machine's"),
        ({"clock_skew_s": 2.0}, "its clock is 2.0 s ahead of this machine's"),
        ({"interface": ""}, "no network interface has the address by which Ray knows the node"),
        ({"cannot_reach": "timed out"}, "cannot connect to the first node: timed out"),
    ],
)
def test_a_node_that_is_not_like_the_others_is_named(change: dict[str, object], what: str) -> None:
    problems = find_problems([NODES[0], replace(NODES[1], **change), NODES[2]])  # type: ignore[arg-type]
    assert [(problem.node, problem.what) for problem in problems] == [("10.0.0.2 (b)", what)]


def test_what_all_nodes_lack_is_a_problem_of_each() -> None:
    lacking = [replace(node, versions={**SAME, "sparsetrain": "missing"}) for node in NODES]
    assert [problem.what for problem in find_problems(lacking)] == ["sparsetrain is missing"] * 3


class Call:
    """A method of an actor that answers at once."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Any:
        return self._answer(*arguments) if callable(self._answer) else self._answer


class Silence:
    """The answer that never comes."""


class FakeProbe:
    def __init__(self, ip: str, *, silent: bool = False) -> None:
        self.address = Call(Silence() if silent else {"ip": ip, "host": "h", "interface": "eth0"})
        self.versions = Call({key: value for key, value in SAME.items() if key != "cuda"})
        self.gpus = Call({"count": 0, "name": "", "cuda": "13.0"})
        self.listen = Call(int(ip[-1]))
        self.reaches = Call(lambda ip, port: f"asked {ip} at {port}")
        self.clock = Call(time.time)


def test_a_first_node_that_is_silent_is_the_only_one_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answers: Any, timeout: float) -> Any:
        if isinstance(answers, list) and any(isinstance(each, Silence) for each in answers):
            raise GetTimeoutError
        return answers

    monkeypatch.setattr(checkup.ray, "get", get)
    nodes = [{"NodeManagerAddress": f"10.0.0.{at}", "NodeManagerHostname": "h", "Resources": {}} for at in (1, 2, 3)]
    probes = [FakeProbe("10.0.0.1", silent=True), FakeProbe("10.0.0.2"), FakeProbe("10.0.0.3")]
    reports, problems = checkup._question(nodes, probes)
    assert [(problem.node, problem.what) for problem in problems] == [("10.0.0.1 (h)", "it did not answer in time")]
    assert [report.name for report in reports] == ["10.0.0.2 (h)", "10.0.0.3 (h)"]
    assert {report.cannot_reach for report in reports} == {"asked 10.0.0.2 at 2"}, "the first that answers"
    with pytest.raises(ClusterError, match=r"no node of the cluster answers; the first one: 10\.0\.0\.1 \(h\), it did"):
        checkup._question(nodes[:1], probes[:1])


def test_a_skew_within_what_the_answer_took_is_none() -> None:
    assert find_problems([replace(GOOD, clock_skew_s=3.0, clock_error_s=2.5)]) == []


def test_the_report_names_nodes_interfaces_and_problems() -> None:
    console = Console(file=io.StringIO(), width=200)
    _print(NODES, find_problems([*NODES, replace(GOOD, name="10.0.0.4 (d)", gpus=0)]), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "3 nodes" in text
    assert "10.0.0.2 (b)  eth0  8 CPUs, 2 x H100  clock +10 ± 1 ms" in text
    assert "torch 2.13.0" in text
    assert "10.0.0.4 (d) Ray hands out 2 GPUs, and torch sees 0" in text


def test_a_probe_tells_what_this_process_would_import() -> None:
    versions = NodeProbe().versions()
    assert versions["sparsetrain"] == f"sources {find_packages().digest[:12]}"
    assert versions["torch"][0].isdigit()


def test_a_probe_reaches_another_that_listens_and_says_why_it_does_not() -> None:
    probe = NodeProbe()
    assert probe.reaches("127.0.0.1", probe.listen()) == ""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "refused" in probe.reaches("127.0.0.1", unused.getsockname()[1])

"""The commands about clusters: what they hand on, and what they print."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from sparsetrain import cluster
from sparsetrain.cli import app
from sparsetrain.errors import ClusterError
from sparsetrain.training.events import Notice


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands in for the job server."""
    made = Mock()
    monkeypatch.setattr(cluster, "JobServer", Mock(return_value=made), raising=False)
    return made


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_stop_says_how_the_job_ended(server: Mock) -> None:
    server.stop.return_value = "STOPPED"
    result = run("jobs", "stop", "run-1", "--address", "http://head:8265")
    assert result.output == "run-1: stopped\n"
    assert server.stop.call_args.args == ("run-1",)


@pytest.mark.parametrize(("flags", "name"), [((), "follow_job"), (("--no-follow",), "print_log")])
def test_logs_shows_events_and_lines(
    server: Mock, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], name: str
) -> None:
    def show(server: object, job: str, *, reporter: Any, write: Any) -> None:
        reporter(Notice("starting [2] workers"))
        write("a line with [brackets]")

    monkeypatch.setattr(cluster, name, show, raising=False)
    result = run("jobs", "logs", "run-1", *flags)
    assert result.output == "starting [2] workers\na line with [brackets]\n"


@pytest.mark.parametrize("command", [("list",), ("status", "run-1"), ("stop", "run-1"), ("logs", "run-1")])
def test_a_cluster_that_cannot_be_had_is_one_message(monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    refuse = Mock(side_effect=ClusterError("nobody answers"))
    monkeypatch.setattr(cluster, "JobServer", refuse, raising=False)
    result = run("jobs", *command, "--address", "http://head:8265")
    assert result.exit_code == 2
    assert result.output == "error: nobody answers\n"
    assert refuse.call_args.args == ("http://head:8265",)


@pytest.mark.parametrize(("healthy", "code"), [(True, 0), (False, 2)])
def test_a_checkup_from_the_cluster_ends_with_what_it_found(
    monkeypatch: pytest.MonkeyPatch, healthy: bool, code: int
) -> None:
    calls = SimpleNamespace(check=Mock(return_value=healthy), submit=Mock())
    monkeypatch.setattr(cluster, "check_cluster", calls.check, raising=False)
    monkeypatch.setattr(cluster, "submit_checkup", calls.submit, raising=False)
    assert run("doctor", "--cluster", "--address", "head:6379").exit_code == code
    assert calls.check.call_args.args[0] == "head:6379"
    assert run("doctor", "--cluster", "--address", "http://head:8265").exit_code == 0
    assert calls.submit.call_args.args == ("http://head:8265",)


def test_an_address_without_cluster_is_refused() -> None:
    result = run("doctor", "--address", "head:6379")
    assert result.exit_code == 2
    assert "add --cluster" in result.output

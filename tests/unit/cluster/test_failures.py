import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError

from sparsetrain.cluster import failures
from sparsetrain.cluster.failures import (
    Cause,
    FailurePolicy,
    GroupFailed,
    RankError,
    RankFailure,
    RestartUseless,
    describe,
    essence,
    restart_notice,
    summary,
)
from sparsetrain.errors import DataError

DIED = RankFailure(Cause.DIED, "died")
LOST = RankFailure(Cause.LOST_PEER, "RuntimeError: Connection closed by peer")


def rank_error(error: Exception) -> RankError:
    try:
        raise error
    except Exception as raised:
        return RankError.from_exception(raised)


def test_a_rank_error_keeps_type_first_line_and_place_and_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(rank_error(TypeError("no such thing\nmore"))))
    assert error.text.startswith("TypeError: no such thing (test_failures.py:")
    assert describe(error).cause is Cause.RAISED


def test_a_lost_connection_is_told_from_a_cause() -> None:
    error = rank_error(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:3234"))
    assert describe(error).cause is Cause.LOST_PEER


@pytest.mark.parametrize("error", [ActorDiedError(), NodeDiedError("node")], ids=["actor", "node"])
def test_a_dead_process_is_the_cause_whichever_way_ray_reports_it(error: Exception) -> None:
    wrapped = RuntimeError("A worker health check failed.")
    wrapped.health_check_failure = error  # type: ignore[attr-defined]
    assert describe(error).cause is describe(wrapped).cause is Cause.DIED


def test_the_dead_rank_is_named_before_those_that_lost_it() -> None:
    failed = GroupFailed({0: LOST, 3: DIED, 5: LOST})
    assert failed.first == (3, DIED)
    notice = restart_notice(failed, restarts=1, max_restarts=3, last_step=40)
    assert notice == "worker rank 3 died; group restarted, resuming from step 40 (1 of 3 restarts)"


def test_a_summary_of_a_thousand_failed_ranks_fits_on_a_screen() -> None:
    failed = GroupFailed(dict.fromkeys(range(1000), LOST) | {7: rank_failure("ValueError: bad")})
    text = summary(failed, world_size=1000, tried="3 restarts", log_folder=Path("/runs/a/logs"), saved="step 5")
    lines = text.splitlines()
    assert len(lines) <= 15
    assert lines[0] == "worker rank 7 of 1000 raised ValueError: bad"
    assert "and 993 more ranks" in text
    assert lines[-1] == "full log: /runs/a/logs/worker-7.log"


def rank_failure(text: str) -> RankFailure:
    return RankFailure(Cause.RAISED, text)


class FakeHub:
    """Stands in for the actor's handle."""

    def __init__(self) -> None:
        self.steps = 0
        self.events: list[Any] = []
        self.num_steps = self

    def remote(self) -> int:
        return self.steps


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(failures.ray, "get", lambda value: value)
    monkeypatch.setattr(failures, "put_events", lambda hub, events: hub.events.extend(events))
    return FakeHub()


def test_a_users_error_ends_the_run_at_once(hub: FakeHub) -> None:
    error = DataError("data.source: no such file")
    with pytest.raises(DataError, match="no such file"):
        FailurePolicy(hub, is_elastic=False).after_exception(
            None, {0: rank_error(RuntimeError("connection closed by peer")), 1: error}
        )


def test_dead_workers_are_restarted_again_and_again(hub: FakeHub) -> None:
    policy = FailurePolicy(hub, is_elastic=False)
    for _ in range(3):
        policy.after_exception(None, {1: ActorDiedError()})
    assert [type(event) for event in hub.events] == [GroupFailed] * 3


def test_only_an_elastic_run_asks_which_nodes_are_left(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(failures, "forget_lost_nodes", lambda: asked.append(len(hub.events)))
    for is_elastic in (False, True):
        FailurePolicy(hub, is_elastic=is_elastic).after_exception(None, {1: ActorDiedError()})
    assert asked == [2], "once, after the driver was told"


def test_an_exception_before_the_first_step_is_not_retried(hub: FakeHub) -> None:
    with pytest.raises(RestartUseless):
        FailurePolicy(hub, is_elastic=False).after_exception(None, {0: rank_error(TypeError("bug"))})


def test_an_exception_that_comes_back_is_not_retried_again(hub: FakeHub) -> None:
    policy, error = FailurePolicy(hub, is_elastic=False), rank_error(TypeError("bug"))
    hub.steps = 25
    policy.after_exception(None, {0: error})
    hub.steps = 30
    with pytest.raises(RestartUseless):
        policy.after_exception(None, {0: error})
    assert len(hub.events) == 1


def test_the_essence_of_what_was_raised_elsewhere_is_its_last_line() -> None:
    cause = RayTaskError("ray::TrainController.__init__", "Traceback\n  file\nImportError: no such name", ValueError())
    assert essence(ActorDiedError(cause)) == "ActorDiedError: ImportError: no such name"
    assert essence(cause) == "RayTaskError: ImportError: no such name"
    assert essence(RuntimeError("what happened\nand then")) == "RuntimeError: what happened"
    assert essence(RuntimeError()) == "RuntimeError: "

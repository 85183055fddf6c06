import sys
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.cluster import worker
from sparsetrain.cluster.failures import RankError
from sparsetrain.cluster.packages import find_packages
from sparsetrain.cluster.worker import WorkerTask, run_worker
from sparsetrain.config import load_config
from sparsetrain.errors import ClusterError, DataError, RankLostError

CONFIG = load_config(Path(__file__).parents[3] / "configs" / "quick.yaml")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerTask:
    """A task for rank 1 of a group that is not there: without Ray, and with this process's own output left alone."""
    marker = tmp_path / ".shared"
    marker.touch()
    context = type("Context", (), {"get_world_rank": lambda self: 1})
    monkeypatch.setattr(worker.ray.train, "get_context", context)
    monkeypatch.setattr(worker.ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr(worker, "_redirect_output", lambda path: print(f"to {path.name}"))
    return WorkerTask(CONFIG, False, None, find_packages(), tmp_path, marker, num_threads=1)


def replace_train(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def train(config: object, **options: Any) -> dict[str, Any]:
        calls.append(options)
        if error is not None:
            raise error
        return {"final_loss": 1.0}

    monkeypatch.setattr(worker, "train", train)
    return calls


def test_a_worker_says_what_it_imports_and_always_resumes(
    task: WorkerTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = replace_train(monkeypatch)
    assert run_worker(task) == {"final_loss": 1.0}
    assert calls == [{"on_existing": "resume", "reporter": None, "profile": False}]
    printed = capsys.readouterr().out
    assert printed.startswith("to worker-1.log\nrank 1 on 10.0.0.2, pid ")
    assert f"sparsetrain {Path(sys.modules['sparsetrain'].__file__ or '').parent}" in printed


def test_a_worker_on_another_filesystem_is_refused(task: WorkerTask, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replace_train(monkeypatch)
    task.marker.unlink()
    with pytest.raises(ClusterError, match=r"output=.* on node 10.0.0.2 .* filesystem that all nodes share"):
        run_worker(task)
    assert calls == []


def test_errors_of_the_users_stay_and_others_become_text(
    task: WorkerTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_train(monkeypatch, DataError("data.source: no such file"))
    with pytest.raises(DataError, match="no such file"):
        run_worker(task)
    replace_train(monkeypatch, KeyError("key"))
    with pytest.raises(RankError, match=r"KeyError: 'key' \(test_worker.py:\d+, train\)"):
        run_worker(task)
    assert capsys.readouterr().err.count("Traceback") == 2, "the log holds each traceback once"


def test_a_worker_that_lost_another_is_restarted(task: WorkerTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The person cannot mend it, so it must not end the run as their mistakes do."""
    replace_train(monkeypatch, RankLostError("another rank has stopped"))
    with pytest.raises(RankError) as raised:
        run_worker(task)
    assert raised.value.lost_peer

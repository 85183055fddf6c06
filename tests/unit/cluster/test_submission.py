import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from sparsetrain.cluster import submission
from sparsetrain.cluster.submission import check_upload_size, follow_job, submit
from sparsetrain.config import RunConfig
from sparsetrain.errors import ClusterError

CONFIG = RunConfig.model_validate(
    {
        "name": "run",
        "model": {"dim": 64, "num_layers": 1, "num_heads": 1},
        "train": {"tokens": 1024, "batch_tokens": 256},
    }
)


def test_an_upload_that_is_too_large_names_the_largest_files(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "huge.pyc").write_bytes(bytes(4000))
    for index in range(8):
        (tmp_path / f"file{index}.bin").write_bytes(bytes(100 * index))
    check_upload_size([tmp_path], limit=2800)
    with pytest.raises(ClusterError) as error:
        check_upload_size([tmp_path], limit=2799)
    assert [line.split()[-1] for line in str(error.value).splitlines()[1:]] == [
        str(tmp_path / f"file{index}.bin") for index in (7, 6, 5, 4, 3)
    ]


def test_a_job_server_that_is_not_there_is_one_message() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ClusterError, match=f"nobody answers at 127.0.0.1:{port}"):
        submit(CONFIG, address=f"http://127.0.0.1:{port}")


class FakeServer:
    """A job server whose connections break off, or fall silent, after a few pieces of the job's output."""

    def __init__(self, *connections: list[str | None]) -> None:
        self.client = self
        self.address = "http://head:8265"
        self._connections = iter(connections)
        self._is_last = False
        self.is_gone = False

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        pieces = next(self._connections)
        self._is_last = "end\n" in pieces
        for piece in pieces:
            if piece is None:
                await asyncio.Event().wait()
            assert piece is not None
            yield piece
        if not self._is_last:
            raise RuntimeError("broken off")

    def details(self, job: str) -> Any:
        if self.is_gone:
            raise ClusterError("has stopped answering")
        status = JobStatus.SUCCEEDED if self._is_last else JobStatus.RUNNING
        return SimpleNamespace(status=status)


def test_output_goes_on_where_a_connection_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "_POLL_S", 0)
    written: list[str] = []
    server: Any = FakeServer(["one\ntw"], ["one\n", "two\nth"], ["one\ntwo\nthree\n", "end\n"])
    follow_job(server, "job", write=written.append)
    assert written == ["one", "two", "three", "end"]


def test_a_server_that_vanishes_without_a_word_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "_SILENCE_S", 0.01)
    server: Any = FakeServer(["one\n", None])

    def write(line: str) -> None:
        server.is_gone = True

    with pytest.raises(ClusterError, match="has stopped answering"):
        follow_job(server, "job", write=write)

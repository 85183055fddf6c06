import socket
from pathlib import Path

import pytest

from sparsetrain.cluster.submission import check_upload_size, submit
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

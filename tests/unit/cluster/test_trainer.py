from pathlib import Path

import pytest

from sparsetrain.cluster import run_on_ray
from sparsetrain.config import load_config
from sparsetrain.errors import ClusterError

CONFIG = Path(__file__).parents[3] / "configs" / "quick.yaml"


def test_too_many_workers_are_refused_before_anything_is_started_or_written(tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = load_config(CONFIG, ["cluster.workers=4096", "train.batch_tokens=256Ki", f"output={output}"])
    with pytest.raises(ClusterError, match=r"cluster.workers=4096 .* asks for 4096 CPUs; this machine has \d+ CPUs"):
        run_on_ray(config, address="local")
    assert not output.exists()


def test_an_address_where_nobody_listens_leaves_an_existing_run_alone(tmp_path: Path) -> None:
    results = tmp_path / "metrics.jsonl"
    (tmp_path / "config.yaml").write_text("# sparsetrain run: the config as it was used, defaults included\n")
    results.write_text('{"step": 1}\n')
    config = load_config(CONFIG, [f"output={tmp_path}", f"data.cache={tmp_path / 'cache'}"])
    with pytest.raises(ClusterError, match="nobody answers at"):
        run_on_ray(config, address="127.0.0.1:1", on_existing="overwrite")
    assert results.read_text() == '{"step": 1}\n'

from pathlib import Path

import pytest

from sparsetrain.cluster.paths import absolute_paths, in_ray_job, job_output_root
from sparsetrain.config import RunConfig

BASE = Path("/home/ada/project")


def make_config(**changes: object) -> RunConfig:
    minimal = {
        "name": "run",
        "model": {"dim": 64, "num_layers": 1, "num_heads": 1},
        "train": {"tokens": 1024, "batch_tokens": 256},
    }
    return RunConfig.model_validate({**minimal, **changes})


def test_every_relative_path_becomes_absolute() -> None:
    sources = [
        {"kind": "text", "paths": ["texts/**/*.txt", "/srv/book.txt"]},
        {"kind": "jsonl", "paths": ["../more.jsonl.gz"]},
        {"kind": "megatron", "prefixes": ["shards/part"]},
    ]
    data = {"source": sources, "tokenizer": "tokenizer.json", "cache": "cache"}
    config = absolute_paths(make_config(data=data, output="runs/a"), BASE)
    text, lines, shards = config.data.source
    assert text.paths == ("/home/ada/project/texts/**/*.txt", "/srv/book.txt")
    assert lines.paths == ("/home/ada/more.jsonl.gz",)
    assert shards.prefixes == ("/home/ada/project/shards/part",)
    assert config.data.tokenizer.path == "/home/ada/project/tokenizer.json"
    assert config.data.cache == "/home/ada/project/cache"
    assert config.output == "/home/ada/project/runs/a"


def test_phases_are_made_absolute_too() -> None:
    phase = {"name": "later", "tokens": 256, "data": {"source": {"kind": "text", "paths": ["later.txt"]}}}
    config = make_config(train={"tokens": 1024, "batch_tokens": 256, "phases": [phase]})
    assert absolute_paths(config, BASE).train.phases[0].data.source[0].paths == ("/home/ada/project/later.txt",)


def test_absolute_paths_stay_and_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = absolute_paths(make_config(output="~/runs/a", data={"cache": "/srv/cache"}), BASE)
    assert (config.output, config.data.cache) == ("/home/ada/runs/a", "/srv/cache")
    assert absolute_paths(config, Path("/elsewhere")) == config


def test_what_is_written_can_have_another_root(tmp_path: Path) -> None:
    (tmp_path / "job" / "base-run").mkdir(parents=True)
    for init_from, expected in (("base-run", "job/base-run"), ("runs/earlier", "root/runs/earlier")):
        train = {"tokens": 1024, "batch_tokens": 256, "init_from": init_from}
        config = make_config(train=train, data={"source": {"kind": "text", "paths": ["a.txt"]}})
        config = absolute_paths(config, tmp_path / "job", output_root=tmp_path / "root")
        assert config.output == str(tmp_path / "root/runs/run")
        assert config.data.cache == str(tmp_path / "root" / make_config().data.cache)
        assert config.data.source[0].paths == (str(tmp_path / "job/a.txt"),)
        assert config.train.init_from == str(tmp_path / expected)


def test_a_dataset_folder_is_a_path_and_a_hub_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "local-set").mkdir()
    source = [{"kind": "huggingface", "name": name} for name in ("local-set", "org/set")]
    local, hub = absolute_paths(make_config(data={"source": source}), tmp_path).data.source
    assert (local.name, hub.name) == (str(tmp_path / "local-set"), "org/set")


def test_a_ray_job_is_recognised_by_what_the_job_server_sets() -> None:
    assert in_ray_job({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_ADDRESS": "10.0.0.1:6379"})
    assert not in_ray_job({"RAY_ADDRESS": "10.0.0.1:6379"})


def test_job_outputs_go_where_the_environment_says_else_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert job_output_root({"SPARSETRAIN_OUTPUT_ROOT": "/nfs/runs"}) == Path("/nfs/runs")
    assert job_output_root({}) == Path("/home/ada/sparsetrain")

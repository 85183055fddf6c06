import json
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.errors import RunFolderError
from sparsetrain.models import Transformer
from sparsetrain.parallel import World
from sparsetrain.planning.flops import parameter_counts
from sparsetrain.training.folder_lock import FolderLock
from sparsetrain.training.metrics import read_metrics
from sparsetrain.training.run_folder import RunFolder
from sparsetrain.training.state import PhaseTotals, RunState

ONE_RANK = World(0, 1, torch.device("cpu"))
YAML = """
name: tiny
model: {dim: 16, num_layers: 1, num_heads: 2}
sparsity:
  - {params: "*.ffn.*", method: static, sparsity: 0.5}
train: {tokens: 64k, batch_tokens: 1Ki}
data: {seq_len: 64, source: {kind: text, paths: [corpus/a.txt]}}
"""


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def make_config(tmp_path, output):
    path = tmp_path / "tiny.yaml"
    path.write_text(YAML)

    def make(*overrides: str) -> RunConfig:
        return load_config(path, [f"output={output}", *overrides])

    return make


@pytest.fixture
def trained(make_config, output) -> Path:
    """A run folder with something in it."""
    with RunFolder.open(make_config(), "refuse", ONE_RANK) as folder:
        folder.describe_data([dataset("a")])
    (output / "metrics.jsonl").write_text('{"step": 1, "tokens": 500}\n{"step": 2, "tokens": 1200, "loss": 1.25}\n')
    (output / "checkpoints" / "step-00000001").mkdir(parents=True)
    return output


def dataset(sha256: str, label: str = "text") -> Any:
    provenance = {"sources": [{"label": label, "sha256": sha256}], "seq_len": 64}
    return SimpleNamespace(provenance=provenance, tokenizer=SimpleNamespace(to_json=lambda: {"kind": "bytes"}))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "lock" not in path.name
    }


def test_a_new_folder_holds_a_config_that_loads_back(make_config, output):
    config = make_config("optimizer.lr=0.25")
    with RunFolder.open(config, "refuse", ONE_RANK) as folder:
        assert folder.path == output
    assert load_config(output / "config.yaml") == config


def test_an_existing_run_is_described_and_left_alone(make_config, trained):
    before = files(trained)
    with pytest.raises(RunFolderError) as error:
        RunFolder.open(make_config(), "refuse", ONE_RANK)
    for part in (str(trained), "step 2", "1.2k tokens", "loss 1.25", "checkpoint at step 1", "--resume", "--overwrite"):
        assert part in str(error.value)
    assert files(trained) == before


def test_a_run_that_came_to_nothing_is_replaced_without_asking(make_config, output):
    RunFolder.open(make_config(), "refuse", ONE_RANK).close()
    RunFolder.open(make_config("seed=5"), "refuse", ONE_RANK).close()
    assert load_config(output / "config.yaml").seed == 5


def test_a_damaged_log_still_counts_as_a_run(make_config, trained):
    (trained / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(RunFolderError, match="already holds a run: step unknown"):
        RunFolder.open(make_config(), "refuse", ONE_RANK)


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(make_config, trained):
    (trained / "notes.txt").write_text("mine")
    RunFolder.open(make_config("seed=5"), "overwrite", ONE_RANK).close()
    assert set(files(trained)) == {"config.yaml", "notes.txt"}
    assert load_config(trained / "config.yaml").seed == 5


@pytest.mark.parametrize("on_existing", ["refuse", "resume", "overwrite"])
@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_a_folder_of_something_else_is_refused_and_left_alone(make_config, output, on_existing, name):
    output.mkdir(parents=True)
    (output / name).write_text("model: {arch: mine}\n")
    (output / "checkpoints").mkdir()
    before = files(output)
    with pytest.raises(RunFolderError, match=rf"not a run folder \(it holds checkpoints, {name}\)"):
        RunFolder.open(make_config(), on_existing, ONE_RANK)
    assert files(output) == before


def test_resuming_with_the_same_config_keeps_everything(make_config, trained):
    before = files(trained)
    with RunFolder.open(make_config(), "resume", ONE_RANK) as folder:
        assert folder.notices == ()
    assert files(trained) == before


def test_resuming_where_nothing_is_begins(make_config, output):
    RunFolder.open(make_config(), "resume", ONE_RANK).close()
    assert (output / "config.yaml").is_file()


def test_resuming_another_config_lists_every_difference(make_config, trained):
    before = files(trained)
    other = make_config("train.tokens=128k", "optimizer.lr=0.5", "sparsity.0.sparsity=0.75", "cluster.workers=2")
    with pytest.raises(RunFolderError) as error:
        RunFolder.open(other, "resume", ONE_RANK)
    lines = str(error.value).splitlines()
    assert sorted(lines[1:-1]) == [
        "  optimizer.lr: 0.0006 there, 0.5 here",
        "  sparsity.0.sparsity: 0.5 there, 0.75 here",
        "  train.tokens: 64000 there, 128000 here",
    ]
    assert files(trained) == before


def test_a_rule_more_or_less_is_a_difference(make_config, trained):
    with pytest.raises(RunFolderError, match=r"\n  sparsity: 1 entries there, 0 entries here\n"):
        RunFolder.open(make_config("sparsity=[]"), "resume", ONE_RANK)


def test_how_and_where_a_run_computes_may_change(make_config, trained):
    overrides = ["cluster.workers=2", "checkpoint.keep=5", "parallel.shard=full", "train.micro_batch_size=4"]
    changed = make_config(*overrides)
    with RunFolder.open(changed, "resume", ONE_RANK) as folder:
        assert len(folder.notices) == 4
        assert "resumed with another cluster.workers: 2, before 1" in folder.notices
    assert load_config(trained / "config.yaml") == changed


def test_a_path_made_absolute_is_the_same(make_config, trained, monkeypatch):
    absolute = make_config(
        f'data.source={{kind: text, paths: ["{os.getcwd()}/corpus/a.txt"]}}', "data.cache=/elsewhere"
    )
    with RunFolder.open(absolute, "resume", ONE_RANK) as folder:
        assert folder.notices == ("resumed with another data.cache: /elsewhere, before .cache/sparsetrain/data",)


def test_a_config_that_cannot_be_read_back_is_not_resumed(make_config, trained):
    with (trained / "config.yaml").open("a") as config:
        config.write("surprise: 1\n")
    with pytest.raises(RunFolderError, match="surprise"):
        RunFolder.open(make_config(), "resume", ONE_RANK)
    RunFolder.open(make_config(), "overwrite", ONE_RANK).close()


def test_another_text_is_not_resumed(make_config, trained):
    with RunFolder.open(make_config(), "resume", ONE_RANK) as folder:
        folder.describe_data([dataset("a", label="moved")])
        with pytest.raises(RunFolderError, match=r"phase 1 \(sha256\).*a there, b now"):
            folder.describe_data([dataset("b")])
    assert json.loads((trained / "data.json").read_text())[0]["sources"][0]["sha256"] == "a"


def test_a_second_process_is_kept_out_until_the_first_is_gone(make_config, output):
    RunFolder.open(make_config(), "refuse", ONE_RANK).close()
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    other = context.Process(target=hold, args=(output / ".lock", theirs))
    other.start()
    try:
        assert mine.recv() == "held"
        for world in (ONE_RANK, None):
            with pytest.raises(RunFolderError, match=rf"is in use: process {other.pid} on .* since 20"):
                RunFolder.open(make_config(), "overwrite", world)
    finally:
        other.kill()
        other.join()
    RunFolder.open(make_config(), "resume", ONE_RANK).close()


def hold(path: Path, pipe: Connection) -> None:
    with FolderLock(path):
        pipe.send("held")
        pipe.recv()


def test_a_driver_keeps_other_drivers_out_and_lets_its_workers_in(make_config):
    with RunFolder.open(make_config(), "refuse", None) as driver:
        assert driver.logs.is_dir()
        with pytest.raises(RunFolderError, match="is in use"):
            RunFolder.open(make_config(), "overwrite", None)
        with RunFolder.open(make_config(), "resume", ONE_RANK):
            pass
    RunFolder.open(make_config(), "refuse", None).close()


def test_a_failed_opening_leaves_no_lock(make_config, trained):
    with pytest.raises(RunFolderError, match="already holds"):
        RunFolder.open(make_config(), "refuse", None)
    RunFolder.open(make_config(), "resume", None).close()


def test_a_folder_that_cannot_be_made_is_one_message(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(RunFolderError, match=rf"output={path} cannot be used: .*set output to another folder"):
            RunFolder.open(make_config(f"output={path}"), "refuse", ONE_RANK)


def test_a_full_disk_is_one_message_and_leaves_the_run(make_config, trained):
    before = files(trained)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunFolder.open(make_config(), "resume", ONE_RANK) as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(RunFolderError, match=r"cannot be used: File too large.*free space"):
                folder.describe_data([dataset("a")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(trained) == before
    assert len(read_metrics(trained)) == 2


def test_too_little_room_for_checkpoints_is_found_beforehand(make_config, output):
    with RunFolder.open(make_config(), "refuse", ONE_RANK) as folder:
        folder.check_space(1_000_000, keep=2)
        with pytest.raises(RunFolderError, match=r"are free on its disk, and checkpoint\.keep=2 needs room for 3"):
            folder.check_space(10**15, keep=2)


def test_finishing_writes_the_summary_that_it_returns(make_config, trained):
    with RunFolder.open(make_config(), "resume", ONE_RANK) as folder:
        state = RunState.fresh(num_phases=1)
        state.totals[0] = PhaseTotals(tokens=1200, steps=2, seconds=4.0, density=0.5)
        model = Transformer(make_config().model, 64, 8)
        summary = folder.finish(make_config(), state, parameters=parameter_counts(model), peak_flops=1.0, sample="text")
    assert (summary["tokens"], summary["tokens_per_s"], summary["density"]) == (1200, 300.0, 0.5)
    assert json.loads((trained / "summary.json").read_text()) == json.loads(json.dumps(summary))

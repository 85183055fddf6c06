"""Runs of models with block-sparse attention, in one process: what they learn, what they record, what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.config import RunConfig
from sparsetrain.errors import ConfigError
from sparsetrain.planning.flops import ModelFlops
from sparsetrain.training import generate_text, preflight, train
from sparsetrain.training.events import Event, Notice
from sparsetrain.training.summary import RunSummary
from sparsetrain.training.trained import TrainedRun
from tests.training_runs import rows_of, tiny_config, write_corpus

NEAR_AND_FIRST = {"kind": "union", "of": [{"kind": "local", "width": 1}, {"kind": "sink", "width": 1}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    write_corpus(folder / "corpus")
    return folder


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    attention = {"kind": "block_sparse", "block": 16, "heads": [NEAR_AND_FIRST], "layers": [1]}
    short = {"data__seq_len": 64, "train__tokens": 6 * 256, "train__phases": [], "sparsity": []}
    return tiny_config(folder, output=str(folder / name), **short | {"model__attention": attention} | changes)


def test_a_sparse_run_counts_what_its_layout_leaves_and_says_which_kernels_ran(folder: Path) -> None:
    events: list[Event] = []
    config = config_of(folder, "told")
    train(config, reporter=events.append)

    summary = RunSummary.load(folder / "told")
    assert rows_of(config.output)[-1]["loss"] < rows_of(config.output)[0]["loss"] - 0.5
    flops = ModelFlops.of(TrainedRun.load(folder / "told").model, 64)
    assert flops.attention_saved_per_token == 3 * 4 * 16 * (64 * 65 / 2 - (4 * 16 * 17 / 2 + 3 * 16 * 16)) / 64
    assert summary.train_flops == summary.executed_flops == pytest.approx(6 * 256 * flops.train_per_token())
    assert summary.attention_flops_saved == pytest.approx(6 * 256 * flops.attention_saved_per_token)
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert [
        message.partition(" ")[0] for message in notices if "attention" in message and "density 0.7" in message
    ] == [
        "block_sparse_attention.gradients",
        "block_sparse_attention.output",
    ]
    assert generate_text(folder / "told", "the of", max_tokens=40)  # of every length up to 43 tokens


def test_recomputing_activations_changes_nothing_that_sparse_attention_learns(folder: Path) -> None:
    changes = {"train__precision": "fp32", "train__tokens": 3 * 256}
    losses = []
    for recompute in (False, True):
        config = config_of(folder, f"recompute-{recompute}", train__activation_checkpointing=recompute, **changes)
        train(config)
        losses.append([row["loss"] for row in rows_of(config.output)])
    assert losses[0] == losses[1]


def test_a_dense_checkpoint_goes_on_with_sparse_attention(folder: Path) -> None:
    dense = config_of(folder, "dense", model__attention="dense")
    train(dense)
    sparse = config_of(folder, "from-dense", train__init_from=str(folder / "dense"))
    train(sparse)
    assert rows_of(sparse.output)[0]["loss"] < rows_of(dense.output)[0]["loss"] - 0.5


def test_preflight_finds_queries_without_keys(folder: Path) -> None:
    heads = [{"kind": "strided", "stride": 2}]
    with pytest.raises(ConfigError, match=r"model\.attention\.heads\.0: {kind: strided, stride: 2}: block 0 .* head 1"):
        preflight(config_of(folder, "blind", model__attention={"kind": "block_sparse", "block": 16, "heads": heads}))

"""Runs of models with experts, in one process: what they record, what they start from, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsetrain.checkpoint import open_weights
from sparsetrain.config import RunConfig
from sparsetrain.errors import CheckpointError, MoeError, PlacementError
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.training import preflight, train
from sparsetrain.training.expert_trace import TRACE_FILE
from sparsetrain.training.metrics import read_evals
from tests.training_runs import rows_of, tiny_config, write_corpus

SHORT = {"sparsity": [], "train__tokens": 3 * 256, "train__phases": []}
MOE = {"num_experts": 4, "ffn_dim": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path) -> Path:
    """A dense run."""
    train(config_of(folder, "dense", None))
    return folder / "dense"


def config_of(folder: Path, name: str, moe: dict[str, Any] | None, **changes: Any) -> RunConfig:
    return tiny_config(folder, output=str(folder / name), model__moe=moe, **SHORT, **changes)


def test_a_run_tells_what_its_experts_did(folder: Path) -> None:
    config = config_of(folder, "told", MOE | {"capacity_factor": 0.5, "aux_loss": 0.1})
    summary = train(config)

    rows = rows_of(config.output)
    trace = LoadTrace.load(Path(config.output) / TRACE_FILE)
    trace.check_model(2, 4, 2)
    assert trace.step_N.tolist() == [row["step"] for row in rows] == [1, 2, 3]
    assert (trace.load_NLE.sum(axis=2) == 256 * 2).all()
    for row, load_LE in zip(rows, trace.load_NLE, strict=True):
        assert row["expert_imbalance"] == pytest.approx((load_LE.max(axis=1) / load_LE.mean(axis=1)).max())
        assert row["dropped_tokens"] >= 2 * 256  # no more than half of what is wanted finds room
        assert row["aux_loss"] > 2 * 0.1 * 0.9  # two layers' balance losses, 1 where the load is even
        assert (row["device_imbalance"], row["replicas"], row["moved_bytes"]) == (1, 0, 0)
    assert summary["parameters"] - summary["active_parameters"] == 2 * 2 * 3 * 16 * 24
    assert summary["experts"]["dropped_tokens"] == sum(row["dropped_tokens"] for row in rows)
    assert summary == json.loads((Path(config.output) / "summary.json").read_text())


def test_the_load_of_a_skipped_step_is_not_counted_into_the_next(folder: Path) -> None:
    changes = {"parallel__experts": "fssdp", "optimizer__lr": 1e30, "optimizer__grad_clip": None}
    config = config_of(folder, "diverging", MOE, **changes)
    train(config)

    assert rows_of(config.output)[-1]["bad_steps"] > 0
    trace = LoadTrace.load(Path(config.output) / TRACE_FILE)
    assert (trace.load_NLE.sum(axis=2) == 256 * 2).all()


def test_a_dense_run_says_nothing_of_experts(dense: Path) -> None:
    assert not any("expert" in key or key == "aux_loss" for row in rows_of(dense) for key in row)
    assert not (dense / TRACE_FILE).exists()


def test_the_balance_loss_evens_out_the_load(folder: Path) -> None:
    """With a weight that drowns everything else, and the loss reported is still the cross entropy."""
    settings = {"train__tokens": 6 * 256, "train__phases": [], "sparsity": []}
    runs = {}
    for weight in (0.0, 30.0):
        output = folder / f"weight-{weight}"
        train(tiny_config(folder, output=str(output), model__moe=MOE | {"aux_loss": weight}, **settings))
        runs[weight] = rows_of(output)

    even, uneven = runs[30.0], runs[0.0]
    assert even[0]["loss"] == uneven[0]["loss"]
    assert uneven[0]["aux_loss"] == 0
    assert even[-1]["expert_imbalance"] < uneven[-1]["expert_imbalance"]


@pytest.mark.parametrize("experts", [None, "fssdp"])
def test_an_upcycled_run_begins_where_the_dense_one_ended(folder: Path, dense: Path, experts: str | None) -> None:
    starts = {"train__init_from": str(dense), "parallel__experts": experts}
    config = config_of(folder, f"upcycled-{experts}", MOE, train__upcycle=True, **starts)
    train(config)

    (last,) = [row for row in read_evals(dense) if row["when"] == "end"]
    (first,) = [row for row in read_evals(Path(config.output)) if row["when"] == "start"]
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_upcycled_experts_can_differ(folder: Path, dense: Path) -> None:
    config = config_of(
        folder,
        "noisy",
        MOE,
        train__upcycle={"noise": 0.1, "mask": 0.25},
        train__init_from=str(dense),
        optimizer__lr=1e-9,
    )
    train(config)

    dense_up = open_weights(dense).read("layers.1.ffn.up.weight")
    first, second = (open_weights(Path(config.output)).read(f"layers.1.moe.experts.{expert}.up") for expert in (0, 1))
    assert (first.abs() < 1e-6).float().mean() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(first, second)
    assert torch.corrcoef(torch.stack([first.flatten(), dense_up.flatten()]))[0, 1] > 0.7


def test_a_dense_model_of_another_size_is_refused(folder: Path, dense: Path) -> None:
    config = config_of(
        folder, "wide", {"num_experts": 4, "ffn_dim": 32}, train__upcycle=True, train__init_from=str(dense)
    )
    with pytest.raises(MoeError, match=r"layers\.0\.moe\.experts\.0\.\w+ of shape .* cannot start from"):
        train(config)


def test_a_weight_that_a_checkpoint_lacks_is_named(dense: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no weight layers\.7\.ffn\.up\.weight"):
        open_weights(dense).read("layers.7.ffn.up.weight")


def test_the_load_trace_of_another_model_is_refused_before_anything_starts(folder: Path) -> None:
    path = folder / "other.npz"
    LoadTrace(np.arange(1), np.ones((1, 2, 8), dtype=np.int64), top_k=2).save(path)
    config = config_of(folder, "replay", MOE | {"router": {"kind": "replay", "trace": str(path)}})

    with pytest.raises(
        PlacementError, match="the load trace belongs to another model: it has 2 MoE layers of 8 experts"
    ):
        preflight(config)


def test_a_process_can_train_one_sharded_run_after_another(folder: Path, dense: Path) -> None:
    """Torch remembers meshes across process groups; that of the first run has more groups than the second's."""
    train(config_of(folder, "first", MOE, parallel__shard="full", parallel__experts="ep"))
    train(config_of(folder, "second", None, parallel__shard="full"))

    for key in ("loss", "grad_norm"):
        alone = [row[key] for row in rows_of(dense)]
        assert [row[key] for row in rows_of(folder / "second")] == alone, key

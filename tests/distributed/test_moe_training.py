"""Training a mixture of experts over ranks against one process, in every layout of experts and of the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.config import RunConfig
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.testing import assert_close, run_distributed
from sparsetrain.training import train
from tests.distributed.moving_runs import Interrupted, beside, saved_tensors, train_pieces, train_until
from tests.training_runs import rows_of, tiny_config, write_corpus

FSSDP = {
    "parallel__experts": "fssdp",
    "parallel__fssdp__reshard_every_steps": 3,
    "parallel__fssdp__replan": "always",
    "parallel__fssdp__pipeline": 2,
}
MEASURED = {"parallel__fssdp__replan": "auto", "parallel__fssdp__pipeline": "auto"}
"""Replicas where measured costs say that they pay: which sums are taken in which order differs from run to run."""
FULL = {"parallel__shard": "full"}
REMATERIALISE = {"parallel__fssdp__rematerialise": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {},
    "ep-ddp": {"parallel__experts": "ep"},
    "ep-full": {"parallel__experts": "ep", **FULL},
    "fssdp-ddp": FSSDP,
    "fssdp-full": FSSDP | FULL | REMATERIALISE | MEASURED,
    "fssdp-ddp-rematerialised": FSSDP | REMATERIALISE | {"train__activation_checkpointing": True},
    "fssdp-groups": FSSDP | {"parallel__ep": 2},
    "fssdp-groups-full": FSSDP | FULL | {"parallel__ep": 2},
}
ON_TWO = ["ddp", "ep-ddp", "ep-full", "fssdp-ddp", "fssdp-full", "fssdp-ddp-rematerialised"]


def layout(folder: Path, name: str, **changes: Any) -> RunConfig:
    moe = {
        "num_experts": 4,
        "ffn_dim": 12,
        "layers": [0, 1],
        "router": {"kind": "sigmoid_topk", "bias_update_rate": 0.02},
        "aux_loss": 0.02,
        "z_loss": 0.001,
        "aux_scope": "sequence",
        "shared_experts": 1,
    }
    finetune = {"name": "finetune", "tokens": 4 * 256, "sparsity": [], "optimizer_state": "keep"}
    settings = {
        "model__moe": moe,
        "train__phases": [finetune],
        "output": str(folder / name),
        "checkpoint__keep": 20,
        "train__sample_tokens": 2,  # writing text takes longer than the training before it
        **LAYOUTS[name],
        **changes,
    }
    config = tiny_config(folder, **settings)
    rule = config.sparsity[0].model_copy(update={"params": ("*.attention.*", "*.experts.*")})
    return config.model_copy(update={"sparsity": (rule,)})


def train_layouts(folder: Path, names: list[str]) -> None:
    for name in names:
        train(layout(folder, name))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the run of one process on it."""
    folder = tmp_path_factory.mktemp("layouts")
    write_corpus(folder / "corpus")
    train(layout(folder, "alone"))
    return folder


@pytest.fixture(scope="module")
def two_ranks(one_process: Path) -> Path:
    """The same runs over two ranks."""
    ranked = beside(one_process, "2")
    run_distributed(train_layouts, 2, ranked, ON_TWO, timeout_s=300)
    return ranked


def test_two_ranks_train_as_one_process_does(one_process: Path, two_ranks: Path) -> None:
    for name in ON_TWO:
        assert_same_training(one_process / "alone", two_ranks / name)


def test_one_rank_trains_as_one_process_does(one_process: Path) -> None:
    alone = beside(one_process, "1")
    names = ["ep-full", "fssdp-ddp"]
    train_layouts(alone, names)
    for name in names:
        assert_same_training(one_process / "alone", alone / name)


ON_FOUR = ["ep-full", "fssdp-ddp", "fssdp-groups", "fssdp-groups-full"]
Stages = list[tuple[str, str, int | None]]
"""Runs, each a folder, a layout, and the step inside which it is stopped; None: it goes on to its end."""


@pytest.fixture(scope="module")
def four_ranks(one_process: Path) -> Path:
    """Runs over four ranks, and the beginnings of two more."""
    ranked = beside(one_process, "4")
    begun: Stages = [("all-ways", "fssdp-ddp", 6), ("groups", "fssdp-groups-full", 6)]
    run_distributed(train_and_begin, 4, ranked, ON_FOUR, begun, timeout_s=300)
    return ranked


def train_and_begin(folder: Path, names: list[str], begun: Stages) -> None:
    train_layouts(folder, names)
    go_on(folder, begun)


def go_on(folder: Path, stages: Stages) -> None:
    train_pieces((layout(folder, name, output=str(folder / run)), step) for run, name, step in stages)


@pytest.mark.slow
def test_four_ranks_train_as_one_process_does(one_process: Path, four_ranks: Path) -> None:
    for name in ON_FOUR:
        assert_same_training(one_process / "alone", four_ranks / name)


@pytest.mark.slow
def test_runs_of_four_ranks_go_on_over_two_on_one_and_without_ranks(one_process: Path, four_ranks: Path) -> None:
    """Each stage resumes from the last checkpoint before the step that stopped the one before."""
    run_distributed(go_on, 2, four_ranks, [("all-ways", "ep-full", 9), ("groups", "fssdp-ddp", None)], timeout_s=280)
    go_on(four_ranks, [("all-ways", "fssdp-ddp", 11), ("all-ways", "alone", None)])

    for run in ("all-ways", "groups"):
        assert_same_training(one_process / "alone", four_ranks / run)


def assert_same_training(oracle: Path, run: Path) -> None:
    expected, rows = rows_of(oracle), rows_of(run)
    assert len(expected) == 12
    for row, wanted in zip(rows, expected, strict=True):
        where = (run.name, row["step"])
        assert row["density"] == wanted["density"], where
        assert row["loss"] == pytest.approx(wanted["loss"], rel=2e-5), where
        assert row["aux_loss"] == pytest.approx(wanted["aux_loss"], rel=1e-4), where
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3), where
    for index in (0, -1):  # inside the sparse phase, and after the dense one
        found, tensors = saved_tensors(run, index), saved_tensors(oracle, index)
        assert found.keys() == tensors.keys()
        for kind in ("model", "optimizer", *(["masks"] if index == 0 else [])):
            assert any(key.startswith(f"{kind}/layers.0.moe.experts.3.") for key in tensors), kind
        for key, tensor in tensors.items():
            if key.startswith("masks/"):
                assert torch.equal(found[key], tensor), (run.name, key)
            else:
                assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)
    loads, wanted_loads = (LoadTrace.load(path / "expert_load.npz") for path in (run, oracle))
    assert (loads.load_NLE == wanted_loads.load_NLE).all()


def test_replicas_and_moves_really_happen(two_ranks: Path) -> None:
    rows = rows_of(two_ranks / "fssdp-ddp")

    assert max(row["replicas"] for row in rows) > 0
    assert max(row["moved_bytes"] for row in rows) > 0
    assert min(row["device_imbalance"] for row in rows) >= 1
    assert all(row["moved_bytes"] == 0 for row in rows_of(two_ranks / "ep-ddp"))


def train_interrupted(folder: Path, names: list[str]) -> None:
    """Every rank stops inside step 7, two steps after a checkpoint, and goes on from there."""
    for name in names:
        with pytest.raises(Interrupted):
            train_until(layout(folder, name), step=7)
        train(layout(folder, name), on_existing="resume")


def test_interrupted_ranks_go_on_bitwise(one_process: Path, two_ranks: Path) -> None:
    broken, names = beside(one_process, "broken"), ["ep-ddp", "fssdp-ddp"]
    run_distributed(train_interrupted, 2, broken, names, timeout_s=300)
    for name in names:
        for key in ("loss", "aux_loss", "grad_norm", "density", "expert_imbalance", "device_imbalance", "replicas"):
            expected = [row[key] for row in rows_of(two_ranks / name)]
            assert [row[key] for row in rows_of(broken / name)] == expected, (name, key)

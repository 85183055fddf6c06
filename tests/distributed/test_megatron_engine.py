"""Megatron-Core against torch's own data parallelism: losses, norms, masks, experts, runs that change engines."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.config import RunConfig
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.testing import run_distributed
from sparsetrain.testing.parity import Curve, Difference, megatron_layouts, train_layouts
from sparsetrain.training.expert_trace import TRACE_FILE
from sparsetrain.training.metrics import read_evals
from sparsetrain.training.summary import SUMMARY_FILE
from tests.distributed.moving_runs import assert_same_run, beside, train_pieces
from tests.training_runs import rows_of, tiny_config, write_corpus

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GRAD_NORM_BOUNDS = {"dense": 1e-4, "sparse": 1e-4, "blocks": 1e-4, "recipe": 1e-4, "moe": 1e-3}
"""Relative. Adam makes rounding grow from step to step, most where routers then choose other experts for a few tokens:
on the model with experts torch's own fully_shard ends up 1.1e-4 from DDP, and layouts of Megatron up to 4.4e-4."""
STEPS = {"dense": 20, "sparse": 20, "blocks": 6, "recipe": 6, "moe": 20}


def train_kinds(world_size: int, kinds: tuple[str, ...]) -> dict[str, dict[str, Curve]]:
    """All kinds in one group of processes, which take longer to start than to train."""
    return {kind: train_layouts(kind, megatron_layouts(kind, world_size), STEPS[kind]) for kind in kinds}


def assert_alike(found: dict[str, dict[str, Curve]], world_size: int) -> None:
    for kind, curves in found.items():
        assert len(curves) == len(megatron_layouts(kind, world_size)) > 2
        reference = next(iter(curves.values()))
        for name, curve in curves.items():
            difference = Difference.between(curve, reference)
            assert difference.loss <= 1e-5, (kind, name)
            assert curve.grad_norm[0] == pytest.approx(reference.grad_norm[0], rel=1e-6), (kind, name)
            assert difference.grad_norm <= GRAD_NORM_BOUNDS[kind], (kind, name)
            assert difference.same_masks, (kind, name)


def test_every_layout_of_two_ranks_trains_as_torch_does() -> None:
    kinds = ("dense", "sparse", "blocks", "moe")
    found = run_distributed(train_kinds, 2, 2, kinds, timeout_s=580)[0]

    assert_alike(found, 2)
    curve = found["sparse"]["megatron, TP2"]
    assert curve.loss[-1] < curve.loss[0] - 0.1
    assert len(set(curve.masks)) > 5, "the masks did not move"
    assert max(curve.grad_norm) > 0.5, "clipping had nothing to do"


def test_every_layout_of_four_ranks_trains_as_torch_does() -> None:
    found = run_distributed(train_kinds, 4, 4, ("sparse", "recipe", "moe"), timeout_s=580)[0]

    assert_alike(found, 4)
    assert len(set(found["recipe"]["megatron, TP2, PP2"].masks)) > 3


# Whole runs: phases, evaluation, checkpoints

LAYOUTS: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero-2": {"parallel__engine": "deepspeed", "parallel__zero": 2},
    "tp": {"parallel__engine": "megatron", "parallel__tp": 2},
    "sp": {"parallel__engine": "megatron", "parallel__tp": 2, "parallel__sp": True},
    "pp": {"parallel__engine": "megatron", "parallel__pp": 2},
    "zero": {"parallel__engine": "megatron", "parallel__zero": 1},
    "cp": {"parallel__engine": "megatron", "parallel__cp": 2, "parallel__zero": 1},
}
MOVES = [("torch", 3), ("tp", 5), ("pp", 7), ("zero-2", 8), ("cp", 9), ("sp", 10), ("zero", 11), ("torch", None)]
MIXED: dict[str, Any] = {
    "model__num_layers": 4,
    "model__moe": {"num_experts": 4, "top_k": 2, "ffn_dim": 16, "layers": [1, 2, 3]},
    "sparsity": [{"params": ["*.attention.*"], "method": "static", "pattern": "block[8,8]", "sparsity": 0.5}],
    "train__tokens": 3 * 256,
    "train__phases": [],
}
SETTINGS = {"train__precision": "bf16", "train__activation_checkpointing": True}


def config_of(folder: Path, layout: str, output: str, **changes: Any) -> RunConfig:
    often = {"checkpoint__keep": 20, "checkpoint__every_steps": 2, "model__num_kv_heads": 2}
    return tiny_config(folder, output=str(folder / output), **often, **LAYOUTS[layout], **changes)


def train_stages(folder: Path, output: str, stages: list[tuple[str, int | None]], **changes: Any) -> None:
    train_pieces((config_of(folder, layout, output, **changes), step) for layout, step in stages)


def train_runs(folder: Path) -> None:
    """A run that moves, one that stays, and settings that do not change what is learned."""
    train_stages(folder, "run", MOVES)
    train_stages(folder, "pipelined", [("pp", None)], train__micro_batch_size=3)  # of 4 samples
    for layout in ("torch", "tp"):
        train_stages(folder, f"bf16-{layout}", [(layout, None)], **SETTINGS)
    for layout in ("torch", "tp"):
        train_stages(folder, f"mixed-{layout}", [(layout, None)], **MIXED)
    train_stages(folder, "mixed-pp", [("pp", 2), ("pp", None)], parallel__experts="fssdp", **MIXED)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a whole run of one process on plain torch."""
    folder = tmp_path_factory.mktemp("megatron")
    write_corpus(folder / "corpus")
    train_stages(folder, "run", [("torch", None)])
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(alone: Path) -> Path:
    folder = beside(alone, "two")
    run_distributed(train_runs, 2, folder, timeout_s=580)
    return folder


def evaluations(output: Path) -> list[float]:
    return [row["loss"] for row in read_evals(output)]


def test_a_run_goes_from_engine_to_engine_with_its_optimizer_state(alone: Path, on_two_ranks: Path) -> None:
    assert_same_run(on_two_ranks / "run", alone / "run")


def test_a_pipeline_takes_micro_batches_of_several_sizes_and_evaluates(alone: Path, on_two_ranks: Path) -> None:
    assert_same_run(on_two_ranks / "pipelined", alone / "run")
    expected = evaluations(alone / "run")
    assert len(expected) > 1
    assert evaluations(on_two_ranks / "pipelined") == pytest.approx(expected, rel=1e-4)


def test_bf16_and_activation_checkpointing_compute_what_they_do_on_torch(on_two_ranks: Path) -> None:
    expected = [row["loss"] for row in rows_of(on_two_ranks / "bf16-torch")]
    assert [row["loss"] for row in rows_of(on_two_ranks / "bf16-tp")] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("layout", ["pp", "tp"])
def test_a_run_tells_of_the_layers_of_all_ranks(on_two_ranks: Path, layout: str) -> None:
    found, wanted = on_two_ranks / f"mixed-{layout}", on_two_ranks / "mixed-torch"
    loads, expected = LoadTrace.load(found / TRACE_FILE), LoadTrace.load(wanted / TRACE_FILE)
    assert loads.load_NLE.shape == (3, 3, 4)
    assert (loads.load_NLE == expected.load_NLE).all()
    for key in ("expert_imbalance", "dropped_tokens", "density"):
        assert [row[key] for row in rows_of(found)] == pytest.approx([row[key] for row in rows_of(wanted)]), key
    summary, theirs = (json.loads((folder / SUMMARY_FILE).read_text()) for folder in (found, wanted))
    for key in ("parameters", "active_parameters", "train_flops", "dense_train_flops"):
        assert summary[key] == pytest.approx(theirs[key], rel=1e-12), key
    ours, expected_rows = (each["phases"][0]["sparse_layers"] for each in (summary, theirs))
    assert {row["weights"] for row in ours} == {f"layers.*.attention.{name}.weight" for name in "qkvo"}
    for key in ("weights", "count", "shape", "pattern", "density"):
        assert [row[key] for row in ours] == [row[key] for row in expected_rows], key

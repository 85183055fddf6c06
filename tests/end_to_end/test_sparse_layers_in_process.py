"""Runs whose zeros kernels leave out: the same losses and weights as masked dense, and what the summary says of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sparsetrain_kernels import dispatch
from typer.testing import CliRunner

from sparsetrain.cli import app
from sparsetrain.errors import RunFolderError
from sparsetrain.models.sparse_linear import PRODUCTS
from sparsetrain.training import TrainedRun, export_run, train
from sparsetrain.training.events import Event, Notice
from sparsetrain.training.summary import RunSummary
from tests.training_runs import losses_of, tiny_config, write_corpus

UP, DOWN = (64, 32), (32, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(autouse=True)
def own_times() -> Iterator[None]:
    yield
    dispatch.use_table("cpu", None)


def run(folder: Path, name: str, pattern: str, gather_s: float, **changes: Any) -> tuple[Path, RunSummary, list[Event]]:
    """A run on a machine that takes 1 s for dense products and `gather_s` for sparse ones."""
    kind, variant = ("block_sparse_linear", "16x16") if "block" in pattern else ("nm_linear", pattern)
    threads = torch.get_num_threads()
    times = {
        dispatch.Problem(f"{kind}.{product}", variant, "cpu", torch.float32, (128, *shape), 0.25, threads): {
            "dense": 1.0,
            "gather": gather_s,
        }
        for product in PRODUCTS
        for shape in (UP, DOWN)
    }
    dispatch.use_table("cpu", dispatch.Table("this machine", times))
    rule = {"params": ["*.ffn.*"], "method": "static", "pattern": pattern, "sparsity": 0.75}
    settings: dict[str, Any] = {
        "model__dim": 32,
        "model__ffn_dim": 64,
        "train__micro_batch_size": 4,
        "train__tokens": 4 * 256,
        "train__phases": [{"name": "finetune", "tokens": 2 * 256, "sparsity": []}],
        "sparsity": [rule],
        "output": str(folder / name),
    }
    events: list[Event] = []
    train(tiny_config(folder, **settings | changes), reporter=events.append)
    return folder / name, RunSummary.load(folder / name), events


@pytest.mark.parametrize("pattern", ["block[16,16]", "vector[16] 1:4"])
def test_kernels_change_nothing_but_the_work(folder: Path, pattern: str) -> None:
    slow, dense, _ = run(folder, f"dense {pattern}", pattern, 2.0)
    fast, sparse, _ = run(folder, f"sparse {pattern}", pattern, 0.4)

    assert losses_of(fast) == pytest.approx(losses_of(slow), rel=1e-5)
    weights, expected = (TrainedRun.load(path).model.state_dict() for path in (fast, slow))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)
    assert [phase.density for phase in sparse.phases] == [0.25, 1.0]
    assert dense.executed_flops == dense.dense_train_flops == sparse.dense_train_flops
    skipped = 0.75 * 6 * 2 * 3 * 32 * 64 * 4 * 256
    assert sparse.dense_train_flops - sparse.executed_flops == pytest.approx(skipped)

    rows = sparse.phases[0].sparse_layers
    assert [(row.weights, row.count, row.implementation) for row in rows] == [
        ("layers.*.ffn.down.weight", 2, "gather"),
        ("layers.*.ffn.gate.weight", 2, "gather"),
        ("layers.*.ffn.up.weight", 2, "gather"),
    ]
    assert all(row.dense_seconds == pytest.approx(3.0) for row in rows)
    assert all(row.sparse_seconds == pytest.approx(1.2) for row in rows)
    assert all(row.flops_skipped == pytest.approx(0.75) for row in rows)
    assert all(row.implementation == "dense" and not row.flops_skipped for row in dense.phases[0].sparse_layers)
    assert sparse.phases[1].sparse_layers == ()


def test_a_pattern_without_a_kernel_runs_masked_dense_and_says_so_once(folder: Path) -> None:
    rule = {"params": ["*.ffn.*", "*.experts.*"], "method": "static", "pattern": "2:4"}
    recipes = [
        {"params": f"layers.{at}.attention.*", "method": m, "pattern": "2:4"} for at, m in enumerate(("ste", "bdwp"))
    ]
    moe = {"num_experts": 2, "top_k": 1, "ffn_dim": 64, "layers": [1]}
    _, summary, events = run(folder, "no kernel", "vector[16] 1:4", 2.0, sparsity=[rule, *recipes], model__moe=moe)
    told = [event.message for event in events if isinstance(event, Notice) and "masked dense" in event.message]
    assert told == [
        "pattern 2:4: no kernel computes it in float32 on cpu; masked dense, so that zeros save no time: "
        "layers.0.ffn.down.weight and 6 more",
        "pattern 2:4: no kernel multiplies with the two masks of bdwp; masked dense, so that zeros save no time: "
        "layers.1.attention.k.weight and 3 more",
        "pattern 2:4: only nn.Linear layers leave out zeros; masked dense, so that zeros save no time: "
        "layers.1.moe.experts.0.down and 5 more",
    ]
    assert summary.phases[0].density == 0.5


def test_a_run_is_exported_with_its_zeros_in_place(folder: Path) -> None:
    path, summary, _ = run(folder, "exported", "vector[16] 1:4", 2.0, train__phases=[])
    to = folder / "out" / "model.safetensors"
    exported = CliRunner().invoke(app, ["export", str(path), "--to", str(to)])
    weights, ours = load_file(to), TrainedRun.load(path).model.state_dict()
    total, nonzero = (sum(map(count, weights.values())) for count in (torch.numel, torch.count_nonzero))
    assert exported.output == f"{to}: {total} weights, {nonzero} of them not zero\n"
    gate = weights["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(gate, ours["layers.1.ffn.gate.weight"])
    assert gate.count_nonzero() == gate.numel() // 4 == summary.phases[0].density * gate.numel()
    again = CliRunner().invoke(app, ["export", str(path), "--to", str(to)])
    assert again.exit_code == 2
    with pytest.raises(RunFolderError, match="exists already; name another file"):
        export_run(path, to)
    with pytest.raises(RunFolderError, match="name a file that ends in"):
        export_run(path, folder / "model.bin")

"""What must not depend on the device, and the paths that only a GPU takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sparsetrain.config import SparsityRule
from sparsetrain.sparsity import Sparsifier
from sparsetrain.testing import requires_gpu, run_distributed
from sparsetrain.training import train
from tests.training_runs import losses_of, tiny_config, write_corpus

RULES = [
    {"method": "static", "criterion": "random"},
    {"method": "static", "criterion": "magnitude", "distribution": "global"},
    {"method": "static", "criterion": "magnitude", "pattern": "block[4,8]", "distribution": "erk"},
]


@requires_gpu
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(rule.values()))
def test_masks_are_bitwise_those_of_the_cpu(rule: dict[str, str]) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).to(device)
        sparsifier = Sparsifier([SparsityRule.model_validate({"params": "*", "sparsity": 0.7, **rule})], seed=3)
        sparsifier.attach(model, torch.optim.AdamW(model.parameters()))
        masks.append({name: mask.cpu() for name, mask in sparsifier.masks().items()})
    on_cpu, on_gpu = masks
    assert on_cpu.keys() == on_gpu.keys()
    for name in on_cpu:
        assert torch.equal(on_cpu[name], on_gpu[name]), name


@requires_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_what_it_learns_on_the_cpu(tmp_path: Path, precision: str) -> None:
    write_corpus(tmp_path / "corpus")
    on_cpu = tiny_config(tmp_path, output=str(tmp_path / "cpu"), train__precision=precision)
    on_gpu = tiny_config(tmp_path, output=str(tmp_path / "gpu"), train__precision=precision, cluster__gpus_per_worker=1)
    train(on_cpu)
    train(on_gpu)
    tolerance = 1e-3 if precision == "fp32" else 0.05
    assert losses_of(on_gpu.output) == pytest.approx(losses_of(on_cpu.output), rel=tolerance)


def train_sharded_over_nccl(folder: Path) -> None:
    train(tiny_config(folder, output=str(folder / "nccl"), parallel__shard="full", cluster__gpus_per_worker=1))


@requires_gpu
def test_a_sharded_run_over_nccl_learns_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    train(tiny_config(tmp_path, output=str(tmp_path / "cpu")))
    run_distributed(train_sharded_over_nccl, 1, tmp_path, backend="nccl", timeout_s=200)
    assert losses_of(tmp_path / "nccl") == pytest.approx(losses_of(tmp_path / "cpu"), rel=1e-3)

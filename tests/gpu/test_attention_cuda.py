"""Models with block-sparse attention learn on a GPU what they learn on the CPU."""

from pathlib import Path

import pytest

from sparsetrain.testing import requires_gpu
from sparsetrain.training import train
from tests.training_runs import losses_of, tiny_config, write_corpus

BIGBIRD = [{"kind": "local", "width": 1}, {"kind": "sink", "width": 1}, {"kind": "random", "count": 1}]
ATTENTION = {"kind": "block_sparse", "block": 16, "heads": [{"kind": "union", "of": BIGBIRD}], "layers": [1]}


@requires_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sparse_run_within_documents_learns_what_it_learns_on_the_cpu(tmp_path: Path, precision: str) -> None:
    write_corpus(tmp_path / "corpus")
    changes = {
        "model__dim": 64,
        "model__attention": ATTENTION | {"within_documents": True},
        "data__seq_len": 128,
        "train__precision": precision,
    }
    on_cpu = tiny_config(tmp_path, output=str(tmp_path / "cpu"), **changes)
    on_gpu = tiny_config(tmp_path, output=str(tmp_path / "gpu"), cluster__gpus_per_worker=1, **changes)
    train(on_cpu)
    train(on_gpu)
    tolerance = 1e-3 if precision == "fp32" else 0.05
    assert losses_of(on_gpu.output) == pytest.approx(losses_of(on_cpu.output), rel=tolerance)

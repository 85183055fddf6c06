"""Methods times patterns: ZeRO-2, and experts that move between ranks, train as torch's data parallelism does."""

from typing import Any

import pytest

from sparsetrain.testing import run_distributed
from sparsetrain.testing.parity import Difference, train_layout

pytest.importorskip("deepspeed")

STEPS = 5
ZERO_2 = {"engine": "deepspeed", "zero": 2}
FSSDP = {"experts": "fssdp", "fssdp": {"reshard_every_steps": 2, "replan": "always"}}
PRUNED = {"sparsity": 0.5, "schedule": {"kind": "cubic", "every_steps": 1}}

LAYERS = [
    {"params": "*.ffn.gate.*", "method": "ste", "pattern": "vector[8] 1:4"},
    {"params": "*.ffn.up.*", "method": "sr_ste", "pattern": "vector[8] 1:4"},
    {"params": "*.0.ffn.down.*", "method": "bdwp", "pattern": "1:4"},
    {"params": "*.1.ffn.down.*", "method": "transposable", "pattern": "2:4", "refresh_every_steps": 2},
    {"params": "*.0.attention.q.*", "method": "mdgf", "pattern": "2:4"},
    {"params": "*.1.attention.q.*", "method": "sdgf", "pattern": "1:4"},
    {"params": "*.0.attention.k.*", "method": "static", "pattern": "vector[8] 1:4"},
    {"params": "*.1.attention.k.*", "method": "static", "pattern": "2:4"},
    {"params": "*.attention.v.*", "method": "prune", "pattern": "block[8,8]", **PRUNED},
    {"params": "*.attention.o.*", "method": "prune", "pattern": "unstructured", **PRUNED},
]
"""Every method, on layers of one model that are apart."""

EXPERTS = [
    {"params": "*.experts.*.gate", "method": "static", "pattern": "vector[8] 1:4"},
    {"params": "*.experts.*.up", "method": "static", "pattern": "2:4"},
    {"params": "layers.0.moe.experts.*.down", "method": "prune", "pattern": "block[8,8]", **PRUNED},
    {"params": "layers.1.moe.experts.*.down", "method": "prune", "pattern": "unstructured", **PRUNED},
]
"""What experts take; recipes refuse them."""


def check_alike(kind: str, rules: list[dict[str, Any]], layouts: list[dict[str, Any]]) -> None:
    reference = train_layout(kind, {}, STEPS, rules=rules)
    assert len(set(reference.masks)) > 2, "no mask moved"
    for parallel in layouts:
        found = Difference.between(train_layout(kind, parallel, STEPS, rules=rules), reference)
        assert found.loss <= 1e-5, parallel
        assert found.grad_norm <= 1e-3, parallel
        assert found.same_masks, parallel


def check_all() -> None:
    check_alike("dense", LAYERS, [ZERO_2])
    check_alike("moe", EXPERTS, [FSSDP, ZERO_2 | FSSDP])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_train_alike() -> None:
    run_distributed(check_all, 2, timeout_s=280)

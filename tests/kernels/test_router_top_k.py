"""The choice of a softmax router: weights, experts and gradients against plain torch in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparsetrain_kernels.router_top_k import router_top_k
from torch import Tensor

from tests.kernels.test_expert_ffn import assert_near, gradients, random


def plainly(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    scores, experts = logits.softmax(-1).sort(descending=True, stable=True)
    weights = scores[:, :top_k]
    return weights / weights.sum(-1, keepdim=True) if renormalise else weights, experts[:, :top_k]


@pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "plain"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(300, 8, 2), (5, 7, 7), (9, 300, 3), (4, 1, 1), (0, 4, 2)], ids=str
)
def test_choices_and_gradients_equal_plain_torch(
    num_tokens: int, num_experts: int, top_k: int, renormalise: bool, device: str, poisoned_memory: None
) -> None:
    logits = 3 * random(num_tokens, num_experts, seed=1, dtype=torch.float32)
    grad = random(num_tokens, top_k, seed=2, dtype=torch.float32)
    ours = gradients(lambda x: router_top_k(x, top_k, renormalise=renormalise)[0], grad.to(device), [logits.to(device)])
    theirs = gradients(lambda x: plainly(x, top_k, renormalise)[0], grad, [logits.double()])
    assert_near([t.cpu() for t in ours], theirs, 2e-6)
    experts = router_top_k(logits.to(device), top_k, renormalise=renormalise)[1]
    assert torch.equal(experts.cpu(), plainly(logits.double(), top_k, renormalise)[1])


def test_equal_scores_choose_different_experts(device: str) -> None:
    weight_TK, expert_TK = router_top_k(torch.zeros(3, 4, device=device), 2, renormalise=True)
    assert (weight_TK == 0.5).all()
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()


def test_it_passes_torchs_own_checks(device: str) -> None:
    logits = random(5, 4, seed=1, dtype=torch.float32).to(device).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sparsetrain.router_top_k.default, (logits, 2, True), test_utils=tests)


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_choices_than_experts_are_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k = {top_k}: expected 1 to 4"):
        router_top_k(torch.zeros(3, 4), top_k, renormalise=True)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(4), r"logits_TE is torch.float32 of shape \(4,\): expected floats of two dimensions"),
        (torch.zeros(3, 4, dtype=torch.int64), r"logits_TE is torch.int64 of shape \(3, 4\): expected floats"),
    ],
    ids=["vector", "integers"],
)
def test_logits_of_other_shapes_and_dtypes_are_refused(logits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_top_k(logits, 1, renormalise=True)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sparsetrain_kernels.router_top_k import triton as host

for kernel in (host._choose_kernel, host._choose_backward_kernel):
    constants = {"TOP_K": 2, "RENORMALISE": True, "K_PADDED": 2, **host._sizes(64)}
    types, given = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], given[(place,)] = "constexpr", constants[name]
        else:
            types[name] = "*i64" if name == "expert_ptr" else "*fp32" if name.endswith("_ptr") else "i32"
    compiled = compile(ASTSource(kernel, types, given), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["_choose_kernel True", "_choose_backward_kernel True"], done.stderr

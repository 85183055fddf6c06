"""Experts and permutation in Triton: in its interpreter where there is no GPU, and on one where there is."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sparsetrain_kernels import (
    expert_ffn,
    expert_ffn_backward,
    expert_ffn_forward,
    moe_ffn,
    permute,
    sort_by_expert,
    unpermute,
)
from sparsetrain_kernels.expert_ffn import reference
from sparsetrain_kernels.row_backend import force_rows
from torch import Tensor

from sparsetrain.testing import requires_gpu
from tests.kernels.test_expert_ffn import Case, assert_near, gradients, random

pytest.importorskip("triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")),
    pytest.param(
        "cuda",
        marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ),
]
on_both = pytest.mark.parametrize("device", DEVICES)
precisions = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.5e-2)], ids=["fp32", "bf16"]
)
COUNTS = {"uneven": [33, 0, 17], "one-expert": [0, 70, 0], "no-rows": [0, 0, 0], "few": [1, 0, 4]}
counts = pytest.mark.parametrize("counts", [pytest.param(c, id=name) for name, c in COUNTS.items()])
forms = pytest.mark.parametrize(
    ("activation", "bias"), [("swiglu", False), ("gelu", True)], ids=["swiglu", "gelu-bias"]
)


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    with force_rows("triton"):
        yield


def on(device: str, case: Case, function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The operator's output and gradients there."""

    def call(x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        options = dict(zip(("b_in", "b_out"), weights[2:], strict=False))
        routing = case.token_R.to(device), weight, case.counts_E.to(device)
        return function(x, *routing, *weights[:2], activation=case.activation, **options)

    return [t.cpu() for t in gradients(call, grad.to(device), [t.to(device) for t in inputs])]


@on_both
@counts
@forms
@precisions
def test_moe_ffn_and_its_gradients_equal_plain_torch(
    device: str,
    counts: list[int],
    activation: str,
    bias: bool,
    dtype: torch.dtype,
    bound: float,
    poisoned_memory: None,
) -> None:
    case = Case(counts, activation, bias, dim=20, ffn_dim=36)
    inputs, dy_TD = case.inputs(dtype), random(case.num_tokens, case.dim, seed=5, dtype=dtype)
    ours = on(device, case, moe_ffn, inputs, dy_TD)
    assert {t.dtype for t in ours} == {dtype}
    assert_near(ours, gradients(case.moe(reference.moe_ffn), dy_TD, [t.double() for t in inputs]), bound)


@on_both
@forms
def test_sizes_of_several_tiles_and_few_rows_an_expert(device: str, activation: str, bias: bool) -> None:
    for case in (
        Case([150, 3, 87], activation, bias, num_tokens=90, dim=72, ffn_dim=130),
        Case([5, 1, 9], activation, bias, num_tokens=6, dim=33, ffn_dim=65),
        Case([2, 0, 3], activation, bias, num_tokens=4, dim=1, ffn_dim=1),
    ):
        inputs, dy_TD = case.inputs(torch.float32), random(case.num_tokens, case.dim, seed=5)
        ours = on(device, case, moe_ffn, inputs, dy_TD)
        assert_near(ours, gradients(case.moe(reference.moe_ffn), dy_TD, [t.double() for t in inputs]), 1e-5)


@on_both
def test_autocast_multiplies_in_bf16_and_returns_gradients_in_the_weights_dtype(device: str) -> None:
    case = Case([33, 0, 17], "swiglu", bias=False, dim=20, ffn_dim=36)
    inputs, dy_TD = case.inputs(torch.float32), random(case.num_tokens, case.dim, seed=5)
    with torch.autocast(device, torch.bfloat16):
        ours = on(device, case, moe_ffn, inputs, dy_TD)
    assert [t.dtype for t in ours] == [torch.bfloat16, *[torch.float32] * 4]
    assert_near(ours, gradients(case.moe(reference.moe_ffn), dy_TD, case.inputs()), 3e-2)


@on_both
@forms
def test_expert_ffn_takes_rows_of_any_strides_and_expanded_gradients(device: str, activation: str, bias: bool) -> None:
    case = Case([33, 0, 7], activation, bias)
    x_RD = random(case.dim, sum(case.counts), seed=6, dtype=torch.float32).mT
    dy_RD = torch.ones(1, 1).expand(x_RD.shape)

    def call(function: Callable[..., Tensor], counts_E: Tensor) -> Callable[..., Tensor]:
        def of(x: Tensor, *weights: Tensor) -> Tensor:
            options = dict(zip(("b_in", "b_out"), weights[2:], strict=False))
            return function(x, counts_E, *weights[:2], activation=activation, **options)

        return of

    inputs = [x_RD, *(w.mT.contiguous().mT if w.dim() > 2 else w for w in case.weights(torch.float32))]
    there = [t.to(device) for t in inputs]
    ours = gradients(call(expert_ffn, case.counts_E.to(device)), dy_RD.to(device), there)
    theirs = gradients(call(reference.expert_ffn, case.counts_E), dy_RD, [t.double() for t in inputs])
    assert_near([t.cpu() for t in ours], theirs, 1e-5)


@on_both
@pytest.mark.parametrize("counts", [[33, 0, 17], [0, 0, 0]], ids=["uneven", "no-rows"])
@forms
@pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "bound"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.float64, 1e-5),
        (torch.bfloat16, torch.float32, 2.5e-2),
    ],
    ids=["fp32", "fp32-into-fp64", "bf16-into-fp32"],
)
def test_functions_on_lists_add_to_gradients_wherever_the_weights_lie(
    device: str,
    counts: list[int],
    activation: str,
    bias: bool,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    bound: float,
    poisoned_memory: None,
) -> None:
    case = Case(counts, activation, bias, dim=20, ffn_dim=36)
    x_RD, dy_RD = (random(sum(counts), case.dim, seed=seed, dtype=dtype).to(device) for seed in (6, 7))
    stacks = case.weights(dtype)
    before = [random(*w.shape, seed=8, dtype=gradient_dtype) for w in stacks]
    lists, into = ([apart(w.to(device)) for w in each] for each in (stacks, before))
    none = [None] * (4 - len(stacks))
    y_RD, saved = expert_ffn_forward(x_RD, counts, *lists, *none, activation)
    dx_RD = expert_ffn_backward(dy_RD, x_RD, saved, counts, *lists, *none, activation, *into, *none)

    def plainly(x: Tensor, *weights: Tensor) -> Tensor:
        options = dict(zip(("b_in", "b_out"), weights[2:], strict=False))
        return reference.expert_ffn(x, case.counts_E, *weights[:2], activation=activation, **options)

    y, dx, *dweights = gradients(plainly, dy_RD.cpu(), [t.cpu().double() for t in (x_RD, *stacks)])
    added = [torch.stack(each).cpu() - b for each, b in zip(into, before, strict=True)]
    assert_near([y_RD.cpu(), dx_RD.cpu(), *added], [y, dx, *dweights], bound)


def apart(stack: Tensor) -> list[Tensor]:
    """Matrices in tensors of their own, the last of them first in memory, at places that are not multiples of 16."""
    memory = stack.new_empty(len(stack), stack[0].numel() + 1)
    tensors = [row[1:].view(stack.shape[1:]) for row in reversed(memory.unbind())]
    for tensor, values in zip(tensors, stack, strict=True):
        tensor.copy_(values)
    return tensors


@on_both
def test_lists_of_weights_that_do_not_match_are_refused(device: str) -> None:
    case = Case([3, 0, 2], "swiglu", bias=False)
    x_RD = random(5, case.dim, seed=6, dtype=torch.float32).to(device)
    w_in, w_out = ([*w.to(device)] for w in case.weights(torch.float32))
    refused = {
        "the weight of expert 1 is .*expected one shape, dtype and device": [w_in[0], w_in[1].double(), w_in[2]],
        r"the weight of expert 0, .* is not contiguous: pass .contiguous\(\)": [w.mT.contiguous().mT for w in w_in],
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            expert_ffn_forward(x_RD, case.counts, wrong, w_out, None, None, "swiglu")
    with pytest.raises(ValueError, match="counts add up to 4 rows, and there are 5"):
        expert_ffn_forward(x_RD, [3, 0, 1], w_in, w_out, None, None, "swiglu")
    half = [w[:, ::2].contiguous() for w in w_out]
    with pytest.raises(ValueError, match=r"w_in, or its gradient, is of shape .*activation='swiglu' it must be"):
        expert_ffn_forward(x_RD, case.counts, w_in, half, None, None, "swiglu")
    y_RD, saved = expert_ffn_forward(x_RD, case.counts, w_in, w_out, None, None, "swiglu")
    weights = case.counts, w_in, w_out, None, None
    for activation, dw_in, dw_out, message in (
        ("relu", w_in, w_out, "activation = relu: expected swiglu or gelu"),
        ("swiglu", w_in[:2], w_out, "dw_in has 2 entries for 3 counts"),
        ("swiglu", w_in, half, "w_in, or its gradient, is of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_ffn_backward(y_RD, x_RD, saved, *weights, activation, dw_in, dw_out, None, None)


@on_both
@precisions
@pytest.mark.parametrize("token_R", [[0, 2, 2, 1, 5, 2], [4], []], ids=["uneven", "one-row", "no-rows"])
def test_permute_and_unpermute_equal_plain_torch(
    device: str, token_R: list[int], dtype: torch.dtype, bound: float, poisoned_memory: None
) -> None:
    token, size = torch.tensor(token_R, dtype=torch.int64, device=device), len(token_R)
    x_TD, y_RD, weight_R = (random(*s, seed=3, dtype=dtype).to(device) for s in ((7, 1030), (size, 1030), (size,)))
    assert torch.equal(permute(x_TD, token), x_TD[token])
    ours = gradients(lambda y, weight: unpermute(y, weight, token, 7), x_TD, [y_RD, weight_R])

    def plainly(y: Tensor, weight: Tensor) -> Tensor:
        return y.new_zeros(7, 1030).index_add(0, token, y * weight.unsqueeze(1))

    assert_near(ours, gradients(plainly, x_TD, [y_RD.double(), weight_R.double()]), bound)
    (dx_TD,) = gradients(lambda x: permute(x, token), y_RD, [x_TD])[1:]
    assert_near([dx_TD], [torch.zeros_like(x_TD, dtype=torch.float64).index_add_(0, token, y_RD.double())], bound)


def every_second(values: Tensor) -> Tensor:
    """The same values, with others between them in memory."""
    return torch.stack([values, torch.zeros_like(values)], 1)[:, 0]


@on_both
def test_tokens_and_weights_of_rows_may_be_of_any_strides(device: str) -> None:
    case = Case([3, 0, 2], "swiglu", bias=False)
    inputs, dy_TD = case.inputs(torch.float32), random(case.num_tokens, case.dim, seed=5)
    wanted = on(device, case, moe_ffn, inputs, dy_TD)
    token_R = every_second(case.token_R.to(device))

    def call(x: Tensor, weight_R: Tensor, *weights: Tensor) -> Tensor:
        return moe_ffn(x, token_R, every_second(weight_R), case.counts_E.to(device), *weights, activation="swiglu")

    for found, expected in zip(gradients(call, dy_TD.to(device), [t.to(device) for t in inputs]), wanted, strict=True):
        assert torch.equal(found.cpu(), expected)
    x_TD, weight_R = (t.to(device) for t in inputs[:2])
    assert torch.equal(permute(x_TD, token_R), x_TD[token_R])
    y_RD = random(5, 40, seed=6, dtype=torch.float32).to(device)
    by_hand = y_RD.new_zeros(case.num_tokens, 40).index_add(0, token_R, y_RD * weight_R.unsqueeze(1))
    torch.testing.assert_close(unpermute(y_RD, every_second(weight_R), token_R, case.num_tokens), by_hand)


@on_both
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [(1000, 2, 8), (37, 3, 5), (100, 1, 1), (500, 8, 300), (0, 2, 4)],
    ids=["several-blocks", "odd", "one-expert", "many-experts", "no-tokens"],
)
def test_assignments_are_sorted_as_torch_sorts_them(
    device: str, num_tokens: int, top_k: int, num_experts: int, poisoned_memory: None
) -> None:
    expert_TK = torch.randint(num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(0)).to(device)
    ours = sort_by_expert(expert_TK, num_experts)
    with force_rows("torch"):
        theirs = sort_by_expert(expert_TK, num_experts)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.library.opcheck(torch.ops.sparsetrain.sort_by_expert.default, (expert_TK, num_experts))


@on_both
def test_equal_calls_give_bitwise_equal_results(device: str) -> None:
    case = Case([40, 0, 61], "swiglu", bias=False, num_tokens=50, dim=64, ffn_dim=96)
    inputs, dy_TD = case.inputs(torch.float32), random(50, 64, seed=5)
    first, second = (on(device, case, moe_ffn, inputs, dy_TD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_both
def test_operators_pass_torchs_own_checks(device: str) -> None:
    case = Case([3, 0, 2], "gelu", bias=True)
    leaves = [t.detach().to(device).requires_grad_() for t in case.inputs(torch.float32)]
    x_TD, weight_R, *weights = leaves
    token_R, counts_E = case.token_R.to(device), case.counts_E.to(device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    routing = token_R, weight_R, counts_E
    torch.library.opcheck(torch.ops.sparsetrain.moe_ffn.default, (x_TD, *routing, *weights, "gelu"), test_utils=tests)
    x_RD = x_TD.detach()[token_R].requires_grad_()
    torch.library.opcheck(
        torch.ops.sparsetrain.expert_ffn.default, (x_RD, counts_E, *weights, "gelu"), test_utils=tests
    )


@on_both
def test_counts_that_exceed_the_rows_touch_no_other_memory(device: str) -> None:
    case = Case([40, 0, 61], "swiglu", bias=False, num_tokens=50, dim=16, ffn_dim=16)
    x_TD, weight_R, *weights = (t.to(device) for t in case.inputs(torch.float32))
    token_R = case.token_R.to(device)
    wrong, right = (
        moe_ffn(x_TD, token_R, weight_R, torch.tensor(c, device=device), *weights)
        for c in ([40, 0, 2**20], case.counts)
    )
    assert torch.equal(wrong, right)


@requires_gpu
@forms
def test_nothing_waits_for_the_gpu(activation: str, bias: bool) -> None:
    case = Case([40, 0, 61], activation, bias, num_tokens=50, dim=64, ffn_dim=96)
    leaves = [t.to("cuda").requires_grad_() for t in case.inputs(torch.bfloat16)]
    token_R, counts_E = case.token_R.cuda(), case.counts_E.cuda()
    options = dict(zip(("b_in", "b_out"), leaves[4:], strict=False))

    def step() -> None:
        y = moe_ffn(leaves[0], token_R, leaves[1], counts_E, *leaves[2:4], activation=activation, **options)
        y.sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None for leaf in leaves)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sparsetrain_kernels.expert_ffn import triton as host, triton_kernels as kernels
from sparsetrain_kernels.permute import triton_kernels as rows

TYPES = {"ends_ptr": "*i32", "token_ptr": "*i64", "row_ptr": "*i64", "first_ptr": "*i64", "weight_ptr": "*fp32"}
TYPES |= {"expert_ptr": "*i64", "counts_ptr": "*i64"}
TYPES |= {f"{name}_place_ptr": "*i64" for name in ("w", "bias", "out", "bias_out")}
TYPES |= {"dweight_ptr": "*fp32", "bias_ptr": "*fp32", "bias_out_ptr": "*fp32"}

def build(kernel, pointer, constants):
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    types, given, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], given[(place,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            types[name], aligned[(place,)] = TYPES.get(name, pointer), [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    compiled = compile(ASTSource(kernel, types, given, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, pointer, compiled.metadata.shared <= 227 * 1024, len(compiled.asm["cubin"]) > 0)

STACKS = {f"{name}_place_ptr": None for name in ("w", "bias", "out", "bias_out")} | {"UNIT": 1}
for dtype, pointer, where in ((torch.bfloat16, "*bf16", STACKS), (torch.float32, "*fp32", {"UNIT": 16})):
    like = torch.empty(0, dtype=dtype)
    products = dict(PRECISION="ieee", UPCAST=False) | where
    tiles = host._tiles(like, 8 * 512, 8) | products
    build(kernels.hidden_kernel, pointer, tiles | {"GATED": True, "bias_ptr": None, "bias_place_ptr": None})
    build(kernels.hidden_kernel, pointer, tiles | {"GATED": False})
    build(kernels.hidden_gradient_kernel, pointer, tiles | {"GATED": True})
    build(kernels.product_kernel, pointer, tiles)
    build(kernels.weight_gradient_kernel, pointer, host._outer_tiles(like) | products | {"ADD": where is not STACKS})
    for kernel in (rows.gather_kernel, rows.combine_kernel, rows.combine_backward_kernel):
        build(kernel, pointer, {"BLOCK_D": 1024})
TYPES |= {name: "*i64" for name in ("first_ptr", "token_ptr", "row_ptr")}
build(rows.count_kernel, "*i64", {"BLOCK_A": 64, "E_PADDED": 64})
build(rows.place_kernel, "*i64", {"TOP_K": 2, "BLOCK_A": 64, "E_PADDED": 64})
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler does, which needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 18, done.stderr
    assert all(line.endswith("True True") for line in lines), done.stdout

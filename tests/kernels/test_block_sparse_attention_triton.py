"""Block-sparse attention in Triton: in its interpreter where there is no GPU, and on one where there is."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparsetrain_kernels import BlockLayout, block_sparse_attention
from sparsetrain_kernels.block_layout import Dense, Local, Random, Sink, Strided
from sparsetrain_kernels.block_sparse_attention.implementations import FORWARD
from torch.nn import functional as F

from sparsetrain.testing import assert_close, requires_gpu
from tests.kernels.block_attention_cases import CALLS, Call, check, computed

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU instead")

SMALL = [
    *(replace(call, batch=min(call.batch, 2)) for call in CALLS),
    Call(batch=1, tokens=70, block=32, lists=1, head_dim=20, kv_heads=1),
    Call(batch=1, tokens=100, block=48, lists=2, causal=False, borders=(0, 60, 100)),
]


@interpreted
@pytest.mark.parametrize("call", SMALL, ids=str)
def test_interpreted_kernels_agree_with_the_oracle(call: Call) -> None:
    check(call, torch.float32, "triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_kernels_agree_with_the_oracle_in_half_precision(dtype: torch.dtype) -> None:
    check(Call(batch=1, tokens=40, lists=2), dtype, "triton")


@interpreted
def test_interpreted_tiles_smaller_than_a_block() -> None:
    check(Call(batch=1, tokens=150, heads=1, kv_heads=1, lists=1, block=128, head_dim=32), torch.float32, "triton")


@interpreted
def test_interpreted_kernels_take_any_strides_and_expanded_gradients() -> None:
    call = Call(batch=1, tokens=40)
    layout = call.layout()
    results = []
    for implementation in ("triton", "reference"):
        inputs = [
            x.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in call.tensors(torch.float32)[:3]
        ]
        out = block_sparse_attention(*inputs, layout, causal=True, implementation=implementation)
        results.append(torch.autograd.grad(out.sum(), inputs))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_interpreted_kernels_write_every_output() -> None:
    layout = BlockLayout.from_mask(torch.zeros(1, 3, 3, dtype=torch.bool), 16)
    call = Call(batch=1, tokens=40, lists=1)
    out, lse, *gradients = computed(call, layout, call.tensors(torch.float32), "triton")
    assert lse.isneginf().all()
    assert not any(x.any() for x in (out, *gradients))


@pytest.mark.parametrize(
    ("call", "dtype", "message"),
    [
        (Call(head_dim=260), torch.float32, "the head dim is 260; at most 256 will do"),
        (Call(block=24), torch.float32, "layout.block is 24; use a multiple of 16"),
        (Call(), torch.float64, "q is torch.float64; pass float32, bfloat16 or float16"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(call: Call, dtype: torch.dtype, message: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(ValueError, match=message):
        computed(call, call.layout(), call.tensors(dtype), "triton", device)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sparsetrain_kernels.block_sparse_attention import triton as host, triton_kernels as kernels

TYPES = {"list_ptr": "*i32", "ranges_ptr": "*i32", "bounds_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
q = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
for backward, kernel in ((False, kernels.forward_kernel), (True, kernels.dq_kernel), (True, kernels.dk_dv_kernel)):
    options = host._tiles(q, 64, backward=backward)[1]
    sizes = dict(HEAD_DIM=128, D=128, BLOCK=64)
    constants = dict(CAUSAL=True, HAS_BOUNDS=True, PRECISION="ieee", UPCAST=False, **sizes, **options)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types, given, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], given[(place,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            types[name], aligned[(place,)] = TYPES.get(name, "*bf16"), [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(kernel, types, given, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    print(kernel.__name__, compiled.metadata.shared <= 227 * 1024, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler does, which needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} True True" for name in ("forward_kernel", "dq_kernel", "dk_dv_kernel")]


@requires_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", SMALL, ids=str)
def test_kernels_agree_with_the_oracle(call: Call, dtype: torch.dtype) -> None:
    check(call, dtype, None, "cuda")


@requires_gpu
def test_more_heads_of_all_samples_than_a_grids_second_dimension_takes() -> None:
    check(Call(batch=4097, tokens=16, heads=16, kv_heads=16, lists=1), torch.float32, "triton", "cuda")


@requires_gpu
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_every_tile_agree_with_the_oracle(head_dim: int, block: int, dtype: torch.dtype) -> None:
    call = Call(
        batch=1, tokens=333, heads=4, kv_heads=2, lists=4, head_dim=head_dim, block=block, borders=(0, 100, 333)
    )
    check(call, dtype, "triton", "cuda")


@requires_gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torchs_own_operator_agrees_with_the_oracle_where_nothing_is_hidden(dtype: torch.dtype, causal: bool) -> None:
    """Without a gradient of the log-sum-exp, which would take another path."""
    call = Call(tokens=333, heads=4, kv_heads=2, head_dim=64, block=64)
    layout = BlockLayout.build(Dense(), 333, causal=causal).to("cuda")
    q, k, v, dout, _ = (x.cuda() for x in call.tensors(dtype))
    results = []
    for implementation in ("dense", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention(
            *leaves, layout, causal=causal, return_lse=True, implementation=implementation
        )
        results.append([out, lse, *torch.autograd.grad(out, leaves, dout)])
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, rtol=5e-2, atol=5e-2)


@requires_gpu
def test_the_dispatcher_runs_on_a_gpu_with_and_without_a_table() -> None:
    call = Call(tokens=333, heads=4, kv_heads=2, head_dim=64, block=64)
    check(call, torch.bfloat16, None, "cuda")
    choice = FORWARD.choose("cuda", torch.bfloat16, "block 64, causal", (8, 333, 333, 64), 0.5)
    assert choice.implementation in FORWARD.implementations
    assert "expected" in str(choice) or "nothing was measured near" in str(choice)


@requires_gpu
@pytest.mark.parametrize("seed", range(20))
def test_kernels_agree_with_the_oracle_on_random_calls(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=draw))]

    tokens, group, kv_heads = one_of(1, 17, 64, 129, 400), one_of(1, 2, 3), one_of(1, 2)
    heads = group * kv_heads
    borders = (0, tokens // 3, tokens // 2, tokens) if one_of(0, 1) else ()
    call = Call(one_of(1, 2), tokens, heads, kv_heads, one_of(16, 40, 64), one_of(16, 32, 48, 64), one_of(1, heads))
    check(replace(call, causal=bool(one_of(0, 1)), borders=borders), torch.float32, "triton", "cuda", seed)


@requires_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_equal_bits_on_a_gpu(dtype: torch.dtype) -> None:
    call = Call(tokens=1000, heads=8, kv_heads=2, lists=8, head_dim=64, block=64)
    first, second = (computed(call, call.layout(), call.tensors(dtype), "triton", "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@requires_gpu
def test_long_sequences_agree_with_dense_attention() -> None:
    """At a size where 32-bit offsets into a batch would still do but no mask of tokens is made."""
    layout = BlockLayout.build(Strided(8) | Local(4) | Sink(1) | Random(2), 8192, num_heads=4).to("cuda")
    q, k, v = (torch.randn(1, 8192, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ours = block_sparse_attention(q, k, v, layout, causal=True)
    mask = layout.to_mask().repeat_interleave(64, 1).repeat_interleave(64, 2).tril()
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[None])
    assert_close(ours, theirs.transpose(1, 2))


@requires_gpu
def test_no_tensor_grows_with_the_square_of_the_length() -> None:
    tokens, heads, dim = 16384, 8, 64
    layout = BlockLayout.build(Local(16) | Sink(1), tokens, block=64).to("cuda")
    inputs = [
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_sparse_attention(*inputs, layout, causal=True).sum().backward()
    matrix = tokens * heads * dim * 2
    # out, dout made contiguous, dq, dk, dv; log-sum-exp and delta in float32; the loss and its gradient.
    assert torch.cuda.max_memory_allocated() - before <= 5 * matrix + 2 * tokens * heads * 4 + 2**20

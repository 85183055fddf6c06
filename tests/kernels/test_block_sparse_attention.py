"""Block-sparse attention on a CPU: the operator, its fast path and its reference."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsetrain_kernels import BlockLayout, block_sparse_attention
from sparsetrain_kernels.block_layout import Dense, Explicit, Local, Sink, Strided
from sparsetrain_kernels.block_sparse_attention import cpu, cpu_rows
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.testing import MemoryMeter, assert_close
from tests.kernels.block_attention_cases import CALLS, Call, check, computed, expected, finite

CALL = Call(tokens=57)
IMPLEMENTATIONS = ["cpu", "dense", "reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_output_and_gradients_are_those_of_the_oracle(call: Call, dtype: torch.dtype, implementation: str) -> None:
    check(call, dtype, implementation)


@pytest.mark.parametrize("implementation", ["cpu", "dense"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_gradients_of_the_output_alone_are_those_of_the_oracle(call: Call, implementation: str) -> None:
    """Without a gradient of the log-sum-exp, which torch's own operator does not know, another path is taken."""
    layout, (q, k, v, dout, dlse) = call.layout(), call.tensors(torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(
        *inputs,
        layout,
        causal=call.causal,
        scale=call.scale,
        cu_seqlens=call.cu_seqlens(),
        implementation=implementation,
    )
    _, _, *wanted = expected(call, layout, [*(x.detach() for x in inputs), dout, torch.zeros_like(dlse)])
    for gradient, oracle in zip(torch.autograd.grad(out, inputs, dout), wanted, strict=True):
        assert_close(gradient, oracle)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_scores_are_not_rounded(dtype: torch.dtype, implementation: str) -> None:
    """Scores up to 100: as they are, bfloat16 would be off by 1/4, and probabilities by a quarter of themselves."""
    call = Call(tokens=130, head_dim=64, block=32)
    layout, (q, k, *rest) = call.layout(), call.tensors(dtype)
    tensors = [5 * q, 5 * k, *rest]
    (out, lse, *gradients), oracle = computed(call, layout, tensors, implementation), expected(call, layout, tensors)
    assert finite(oracle[1]).abs().max() > 60
    assert (finite(lse) - finite(oracle[1])).abs().max() < 1e-3
    for found, wanted in zip((out, *gradients), (oracle[0], *oracle[2:]), strict=True):
        assert (found.double() - wanted).norm() < 3 * torch.finfo(dtype).eps * wanted.norm()


@given(
    tokens=st.integers(1, 40),
    block=st.integers(1, 12),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    shared=st.booleans(),
    causal=st.booleans(),
    borders=st.lists(st.integers(0, 80), max_size=4),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_any_layout_and_any_documents(
    tokens: int,
    block: int,
    group: int,
    kv_heads: int,
    shared: bool,
    causal: bool,
    borders: list[int],
    batch: int,
    seed: int,
) -> None:
    heads = group * kv_heads
    total = tokens * batch
    cut = (0, *sorted(b % total for b in borders), total) if borders else ()
    lists = 1 if shared else heads
    call = Call(batch, tokens, heads, kv_heads, 4, block, lists, causal, cut)
    check(call, torch.float64, "cpu", seed=seed)


def test_fast_path_computes_the_same_row_by_row_as_many_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = computed(CALL, CALL.layout(), CALL.tensors(torch.float64), "cpu")
    monkeypatch.setattr(cpu_rows, "_BYTES_AT_ONCE", 1)
    alone = computed(CALL, CALL.layout(), CALL.tensors(torch.float64), "cpu")
    for one, other in zip(alone, together, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_visible_key_gives_zero_and_no_gradient(implementation: str) -> None:
    layout = BlockLayout.from_mask(torch.zeros(1, 4, 4, dtype=torch.bool), 16)
    out, lse, *gradients = computed(CALL, layout, CALL.tensors(torch.float32), implementation)
    assert lse.isneginf().all()
    for x in (out, *gradients):
        assert torch.equal(x, torch.zeros_like(x))


def test_causality_that_would_leave_a_query_no_key_is_refused_unless_asked_for() -> None:
    """Blocks look one ahead: without causality each sees a key, with it the first of head 1 sees none."""
    ahead = [Dense(), Explicit(torch.ones(4, 4).diagonal_scatter(torch.zeros(4)).bool())]
    q, k, v, *_ = Call(tokens=57).tensors(torch.float32)
    layout = BlockLayout.build(ahead, 57, block=16, causal=False)
    assert block_sparse_attention(q, k, v, layout, causal=False).isfinite().all()
    with pytest.raises(ValueError, match=r"query block 0 of head 1 would see no key.*build it with causal=True"):
        block_sparse_attention(q, k, v, layout, causal=True)
    with pytest.raises(ValueError, match="query block 0 of head 1 sees no key"):
        BlockLayout.build(ahead, 57, block=16)
    allowed = BlockLayout.build(ahead, 57, block=16, causal=False, allow_empty=True)
    for same in (allowed, BlockLayout.from_mask(layout.to_mask(), 16), layout.slice_queries(0, 4)):
        out, lse = block_sparse_attention(q, k, v, same, causal=True, return_lse=True)
        assert not out[:, :16, 1].any()
        assert lse[:, 1].isneginf().sum() == 2 * 16
    covered = BlockLayout.build(Local(1), 57, block=16, causal=False)
    assert block_sparse_attention(q, k, v, covered, causal=True).isfinite().all()


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_layout_that_hides_nothing_is_dense_attention(causal: bool, implementation: str | None) -> None:
    call = Call(tokens=57, heads=4, kv_heads=2)
    q, k, v, dout, _ = call.tensors(torch.float32)
    layout = BlockLayout.build(Dense(), 57, block=16, causal=causal)
    results = []
    for is_ours in (True, False):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if is_ours:
            out = block_sparse_attention(*inputs, layout, causal=causal, implementation=implementation)
        else:
            heads_first = (x.transpose(1, 2) for x in inputs)
            out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True).transpose(1, 2)
        results.append([out, *torch.autograd.grad(out, inputs, dout)])
    for ours, dense in zip(*results, strict=True):
        assert_close(ours, dense)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_of_inputs_and_gradients_make_no_difference(implementation: str) -> None:
    q, k, v, *_ = CALL.tensors(torch.float64)
    layout = CALL.layout()

    def gradients(inputs: list[Tensor], weight: Tensor | None) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs]
        out = block_sparse_attention(*leaves, layout, causal=True, implementation=implementation)
        loss = out.sum() if weight is None else (out.transpose(1, 2) * weight).sum()
        return list(torch.autograd.grad(loss, leaves))

    def strided(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2).detach()

    ones = torch.ones(2, 2, 57, 16, dtype=torch.float64)
    stride_0 = gradients([q.clone(), k.clone(), v.clone()], None)  # sum() hands down an expanded scalar
    for other in (gradients([strided(x) for x in (q, k, v)], ones), gradients([q.clone(), k.clone(), v.clone()], ones)):
        for a, b in zip(stride_0, other, strict=True):
            assert_close(a, b)


def test_gradient_flows_through_the_log_sum_exp_alone() -> None:
    q, k, v, _, dlse = CALL.tensors(torch.float64)
    layout = BlockLayout.build(Local(2), 57, block=16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    _, lse = block_sparse_attention(*leaves, layout, causal=True, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse, leaves, dlse)
    silent = [*CALL.tensors(torch.float64)[:3], torch.zeros_like(q), dlse]
    oracle = expected(replace(CALL, lists=1), layout, silent)
    assert_close(dq, oracle[2])
    assert_close(dk, oracle[3])
    assert not dv.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_equal_bits(dtype: torch.dtype) -> None:
    call = Call(batch=1, tokens=130, heads=4, kv_heads=2, lists=4)
    first, second = (computed(call, call.layout(), call.tensors(dtype), "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_of_queries_and_keys_combine_to_the_whole() -> None:
    """What context parallelism does: attend to parts of the keys apart, and weigh them by their log-sum-exp."""
    q, k, v, dout, _ = CALL.tensors(torch.float64)
    layout = BlockLayout.build(Strided(2) | Local(1) | Sink(1), 57, block=16, num_heads=2)
    cu_seqlens = torch.tensor([0, 20, 57])
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for first, end in ((0, 1), (1, 4)):
            queries = slice(first * 16, end * 16)
            parts = []
            for first_key, end_key in ((0, 2), (2, 4)):
                keys = slice(first_key * 16, end_key * 16)
                part = layout.slice_queries(first, end).slice_keys(first_key, end_key)
                tensors = q[:, queries], k[:, keys], v[:, keys]
                parts.append(
                    block_sparse_attention(*tensors, part, causal=True, cu_seqlens=cu_seqlens, return_lse=True)
                )
            share = torch.softmax(torch.stack([lse for _, lse in parts]), 0).mT.unsqueeze(-1)
            outs.append(sum(out * part for (out, _), part in zip(parts, share, strict=True)))
        return torch.cat(outs, 1)

    whole = block_sparse_attention(*leaves, layout, causal=True, cu_seqlens=cu_seqlens)
    parts = in_parts(*leaves)
    assert_close(parts, whole)
    for a, b in zip(torch.autograd.grad(parts, leaves, dout), torch.autograd.grad(whole, leaves, dout), strict=True):
        assert_close(a, b)


def test_a_slice_at_the_beginning_does_not_take_its_documents_for_those_of_all_samples() -> None:
    """The whole is as long as both samples of the slice together, and its documents end there."""
    q, k, v, *_ = Call(tokens=64).tensors(torch.float64)
    layout, cu_seqlens = BlockLayout.build(Dense(), 64, block=16), torch.tensor([0, 20, 64])
    whole = block_sparse_attention(q, k, v, layout, causal=True, cu_seqlens=cu_seqlens)
    first = layout.slice_queries(0, 2).slice_keys(0, 2)
    half = (x[:, :32] for x in (q, k, v))
    assert_close(block_sparse_attention(*half, first, causal=True, cu_seqlens=cu_seqlens), whole[:, :32])


def test_slices_of_heads_are_heads_of_the_whole() -> None:
    q, k, v, *_ = CALL.tensors(torch.float64)
    layout = CALL.layout()
    whole = block_sparse_attention(q, k, v, layout, causal=True)
    one = block_sparse_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], layout.slice_heads(1, 2), causal=True)
    assert_close(one, whole[:, :, 1:])


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_is_read_before_it_is_written() -> None:
    for call in (CALLS[2], CALLS[6]):
        check(call, torch.float32, "cpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_leaves_the_inputs_dtype_alone(implementation: str) -> None:
    plain = computed(CALL, CALL.layout(), CALL.tensors(torch.float32), implementation)
    with torch.autocast("cpu", torch.bfloat16):
        inside = computed(CALL, CALL.layout(), CALL.tensors(torch.float32), implementation)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operator_passes_opcheck(implementation: str) -> None:
    call = Call(batch=1, tokens=20, heads=2, kv_heads=1, head_dim=4, block=8, borders=(0, 9, 20))
    q, k, v, *_ = call.tensors(torch.float32)
    visible = call.layout().visibility(1, 20, 20, causal=True, cu_seqlens=call.cu_seqlens())
    lists = visible.key_blocks, visible.row_ranges, visible.query_blocks, visible.column_ranges
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for bounds in (visible.bounds, None):
        torch.library.opcheck(
            torch.ops.sparsetrain.block_sparse_attention.default,
            (*inputs, 8, True, 0, *lists, visible.density, bounds, 0.5, implementation),
        )


def test_compiles_into_one_graph() -> None:
    call = Call(batch=1, tokens=40, borders=(0, 9, 40))
    layout, cu_seqlens = call.layout(), call.cu_seqlens()
    q, k, v, dout, _ = call.tensors(torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = block_sparse_attention(q, k, v, layout, causal=False)
        out, lse = block_sparse_attention(q * 2, k, v, layout, causal=True, cu_seqlens=cu_seqlens, return_lse=True)
        return ((out + plain) * dout).sum() + lse.exp().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager)


@pytest.mark.slow
def test_the_compiler_makes_one_graph_of_it_and_its_neighbours() -> None:
    call = Call(batch=1, tokens=40)
    layout, (q, k, v, dout, _) = call.layout(), call.tensors(torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = block_sparse_attention(q * 2, k, v.sin(), layout, causal=True, return_lse=True)
        return (out.relu() * dout).sum() + lse.exp().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_both_passes_keeps_to_its_formula(dtype: torch.dtype) -> None:
    """The formula of `cpu`'s docstring, at a size where one matrix of scores would take several times as much."""
    tokens, heads, dim = 2048, 4, 16
    layout = BlockLayout.build(Strided(16) | Local(2), tokens, num_heads=heads)
    visible = layout.visibility(1, tokens, tokens, causal=True)
    q, k, v, dout = (torch.randn(1, tokens, heads, dim, dtype=dtype) for _ in range(4))
    with MemoryMeter() as forward:
        out, lse = cpu.forward(q, k, v, visible, 0.25)
    with MemoryMeter() as backward:
        cpu.backward(dout, None, q, k, v, out, lse, visible, 0.25)
    blocks = 40 * int(layout.to_mask().sum())
    assert forward.peak_bytes <= 6 * q.nbytes + 6 * 2**20 + blocks
    assert backward.peak_bytes <= (9 + 8 / q.element_size()) * q.nbytes + 12 * 2**20 + blocks
    assert max(forward.largest_bytes, backward.largest_bytes) <= 2**20 < tokens**2 * heads
    assert forward.peak_bytes > 3 * q.nbytes  # it measures


def test_package_imports_without_triton() -> None:
    """And says so when Triton's implementation is asked for."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from sparsetrain_kernels import BlockLayout, block_sparse_attention
x = torch.ones(1, 4, 1, 4)
layout = BlockLayout.from_mask(torch.ones(1, 1, 1, dtype=torch.bool), 4)
print(block_sparse_attention(x, x, x, layout, causal=True).sum().item())
try:
    block_sparse_attention(x, x, x, layout, causal=True, implementation="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "16.0",
        "implementation='triton': Triton is not installed; install it, or pass implementation=None",
    ]


def arguments(**changes: object) -> dict[str, object]:
    q, k, v, *_ = CALL.tensors(torch.float32)
    return {"q": q, "k": k, "v": v, "layout": CALL.layout(), "causal": True} | changes


ONE = torch.ones(2, 57, 2, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": ONE[0]}, r"must be \[batch, tokens, heads, head dim\]"),
        ({"k": ONE[..., :8], "v": ONE[..., :8]}, "the batch and head dim of q"),
        ({"v": ONE[:, :40]}, "k and v must have one shape"),
        ({"q": ONE.repeat(1, 1, 2, 1)[:, :, :3]}, "the 2 heads of k and v must divide the 3 heads of q"),
        ({"q": ONE[:0], "k": ONE[:0], "v": ONE[:0]}, "no size may be 0"),
        ({"v": ONE.double()}, "must all be one of float32, bfloat16, float16, float64"),
        ({"q": ONE.int(), "k": ONE.int(), "v": ONE.int()}, "q, k, v are torch.int32"),
        ({"k": ONE.to("meta")}, "q, k, v are on cpu, meta, cpu"),
        ({"layout": Call(lists=3).layout()}, "lists for 3 heads but q has 2: build it with num_heads=2"),
        (
            {"layout": Call(tokens=80).layout()},
            "5 blocks of 16 queries but there are 57 queries: build",
        ),
        ({"layout": CALL.layout().to("meta")}, r"pass layout.to\(q.device\)"),
        ({"cu_seqlens": torch.tensor([0.0, 57.0])}, "must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 40, 30, 57])}, r"cu_seqlens=\[0, 40, 30, 57\]: must start with 0 and ascend"),
        ({"cu_seqlens": torch.tensor([0, 30])}, "ends at 30: must end at 57, the tokens of a sample, or at 114"),
        ({"q": [1.0]}, "q is a list: must be a tensor"),
        ({"layout": CALL.layout().to_mask()}, "layout is a Tensor: must be a BlockLayout; BlockLayout.from_mask makes"),
        ({"cu_seqlens": [0, 57]}, "cu_seqlens is a list: must be an integer tensor"),
        ({"causal": None}, "causal=None: must be True or False"),
        ({"scale": float("nan")}, "scale=nan: must be a finite number"),
        ({"implementation": "cuda"}, "implementation='cuda': must be one of reference, dense, cpu, triton"),
    ],
)
def test_mistakes_are_named_with_what_would_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments(**changes))  # type: ignore[arg-type]

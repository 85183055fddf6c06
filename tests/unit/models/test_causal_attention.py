import pytest
import torch
from torch.nn import functional as F

from sparsetrain.models import causal_attention as module
from sparsetrain.models.causal_attention import causal_attention
from sparsetrain.testing import assert_close

SHAPES = pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads"),
    [(1, 2, 2), (63, 2, 2), (64, 4, 2), (65, 4, 1), (150, 3, 3), (150, 6, 2)],
    ids=lambda size: str(size),
)


def inputs(num_tokens, num_heads, num_kv_heads, dtype=torch.float64):
    torch.manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [torch.randn(2, num_tokens, h, 8, dtype=dtype, requires_grad=True) for h in heads]


def oracle(q, k, v, document_ids=None):
    """Attention written out, one row of scores after another."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if document_ids is not None:
        hidden = hidden | (document_ids[:, None, :, None] != document_ids[:, None, None, :])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def documents(num_tokens):
    ids = torch.arange(num_tokens) // 40
    return torch.stack([ids, (torch.arange(num_tokens) + 17) // 23])


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("path", ["cpu", "sdpa"])
@SHAPES
def test_attention_and_gradients_equal_the_formula(monkeypatch, path, packed, num_tokens, num_heads, num_kv_heads):
    if path == "sdpa":
        monkeypatch.setattr(module, "_LONGEST_ON_CPU", 0)
    qkv = inputs(num_tokens, num_heads, num_kv_heads)
    ids = documents(num_tokens) if packed else None
    actual, expected = causal_attention(*qkv, ids), oracle(*qkv, ids)
    upstream = torch.randn_like(expected)
    assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        assert_close(ours, theirs)


def test_stride_zero_gradients_are_read_right():
    qkv = inputs(70, 2, 1)
    actual = torch.autograd.grad(causal_attention(*qkv).sum(), qkv)
    for ours, theirs in zip(actual, torch.autograd.grad(oracle(*qkv).sum(), qkv), strict=True):
        assert_close(ours, theirs)


def test_bf16_is_near_float32_and_stays_bf16_under_autocast():
    qkv = inputs(150, 4, 2, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    with torch.autocast("cpu", torch.bfloat16):
        actual = causal_attention(*qkv)
    expected = oracle(*exact)
    upstream = torch.randn_like(expected)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() / expected.norm() < 1e-2
    for ours, theirs in zip(
        torch.autograd.grad(actual, qkv, upstream.bfloat16()),
        torch.autograd.grad(expected, exact, upstream),
        strict=True,
    ):
        assert (ours - theirs).norm() / theirs.norm() < 2e-2


def test_long_samples_on_a_cpu_use_torchs_operator(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **kwargs: calls.append(q) or q)
    q = torch.zeros(1, module._LONGEST_ON_CPU + 1, 1, 8)
    causal_attention(q, q, q)
    assert len(calls) == 1

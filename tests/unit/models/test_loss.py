import pytest
import torch
from torch.nn import functional as F

from sparsetrain.models import loss as loss_module
from sparsetrain.models.loss import linear_cross_entropy
from sparsetrain.testing import assert_close


def case(dtype=torch.float64, num_tokens=(3, 7), dim=16, vocab=40):
    torch.manual_seed(0)
    x = torch.randn(*num_tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, num_tokens)
    targets[..., ::3] = -100
    return x, weight, targets


def oracle(x, weight, targets):
    return F.cross_entropy((x @ weight.T).flatten(0, -2), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 64])
def test_loss_and_gradients_do_not_depend_on_the_chunks(monkeypatch, chunk_tokens):
    x, weight, targets = case()
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", chunk_tokens * 40 * 8)
    actual, expected = linear_cross_entropy(x, weight, targets), oracle(x, weight, targets)
    assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(0.3 * actual, (x, weight)), torch.autograd.grad(0.3 * expected, (x, weight)), strict=True
    ):
        assert_close(ours, theirs)


def test_huge_logits_neither_overflow_nor_vanish():
    x = torch.tensor([[300.0, -300.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    actual = linear_cross_entropy(x, weight, torch.tensor([1]))
    assert actual.item() == 600.0
    assert torch.autograd.grad(actual, x)[0].tolist() == [[1.0, -1.0]]


def test_nothing_counted_is_a_loss_of_zero_without_gradients():
    x, weight, targets = case()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (x, weight)))


def test_frozen_inputs_get_no_gradient():
    x, weight, targets = case()
    linear_cross_entropy(x.detach(), weight, targets).backward()
    linear_cross_entropy(x, weight.detach(), targets).backward()
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad
    expected = torch.autograd.grad(oracle(x, weight, targets), (x, weight))
    assert_close(x.grad, expected[0])
    assert_close(weight.grad, expected[1])


def test_bf16_autocast_keeps_softmax_and_sums_in_float32():
    x, weight, targets = case(torch.float32, num_tokens=(4, 64), dim=32, vocab=512)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    grads = torch.autograd.grad(loss, (x, weight))
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(
        (rounded[0] @ rounded[1].T).bfloat16().float().flatten(0, -2), targets.flatten(), reduction="sum"
    )
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    assert_close(loss, expected, rtol=1e-4, atol=0.0)
    for grad, exact in zip(grads, torch.autograd.grad(oracle(*rounded, targets), rounded), strict=True):
        assert (grad - exact).norm() / exact.norm() < 1e-2

import pytest
import torch

from sparsetrain.models.norms import LayerNorm, RMSNorm
from sparsetrain.testing import assert_close


def formula(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)], ids=str)
def test_rms_norm_and_gradients_equal_the_formula(shape):
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-3).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm.weight.normal_()
    actual, expected = norm(x), formula(x, norm.weight, 1e-3)
    upstream = torch.randn_like(expected)
    assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x, norm.weight), upstream),
        torch.autograd.grad(expected, (x, norm.weight), upstream),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_rms_norm_reads_stride_zero_gradients_right():
    norm = RMSNorm(24, eps=1e-3).double()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert_close(torch.autograd.grad(norm(x).sum(), x)[0], torch.autograd.grad(formula(x, 1.0, 1e-3).sum(), x)[0])


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_rms_norm_gives_no_gradient_to_what_is_frozen(frozen):
    norm = RMSNorm(24, eps=1e-3)
    norm.weight.requires_grad_(frozen != "weight")
    x = torch.randn(5, 24, requires_grad=frozen != "input")
    norm(x).square().sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (norm.weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("norm", [RMSNorm(24, 1e-5), LayerNorm(24, 1e-5)], ids=["rms", "layer"])
def test_norms_hand_the_autocast_dtype_on(norm):
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, norm(x).detach())
    assert norm(x).dtype == torch.float32
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32

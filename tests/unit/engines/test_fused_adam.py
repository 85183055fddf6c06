"""Kernels of apex and Transformer Engine: used if they import, and the same AdamW. Stand-ins do their arithmetic."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.config import OptimizerConfig
from sparsetrain.engines.fused_adam import FusedAdamW, find_adam_kernel, optimizer_class
from sparsetrain.engines.optimizer import OptimizerGroup, adamw
from sparsetrain.models.norms import find_rms_norm

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
APEX = ("apex", "amp_C", "apex.multi_tensor_apply")
TRANSFORMER_ENGINE = ("Transformer Engine", "transformer_engine_torch", "transformer_engine.pytorch.optimizers")
LIBRARIES = pytest.mark.parametrize("library", [APEX, TRANSFORMER_ENGINE], ids=lambda library: library[0])


def adam_kernel(
    chunk: int, no_op: Tensor, tensors: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """AdamW as both libraries' kernels compute it (arXiv 1711.05101, algorithm 2)."""
    assert (chunk, mode, bias_correction, no_op.item()) == (2048 * 32, 1, 1, 0)
    for gradient, parameter, mean, square in zip(*tensors, strict=True):
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        parameter.sub_(lr * (update + weight_decay * parameter))


def applier(kernel: Any, no_op: Tensor, tensors: list[list[Tensor]], *hyper: Any) -> None:
    kernel(2048 * 32, no_op, tensors, *hyper)


def put(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Make a module, and the packages that it is in, importable."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        module = sys.modules.get(path) or ModuleType(path)
        if depth < len(parts):
            module.__path__ = []
        else:
            vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)


def install(monkeypatch: pytest.MonkeyPatch, library: tuple[str, str, str]) -> None:
    put(monkeypatch, library[1], multi_tensor_adam=adam_kernel)
    put(monkeypatch, library[2], multi_tensor_applier=applier)


@pytest.fixture(autouse=True)
def _look_anew() -> Iterator[None]:
    for find in (find_adam_kernel, find_rms_norm):
        find.cache_clear()
    yield
    for find in (find_adam_kernel, find_rms_norm):
        find.cache_clear()


def test_without_them_torch_updates_weights() -> None:
    assert find_adam_kernel() is None
    assert find_rms_norm() is None
    assert optimizer_class(CUDA) is torch.optim.AdamW


@LIBRARIES
def test_one_that_imports_is_used_on_cuda_alone(monkeypatch: pytest.MonkeyPatch, library: tuple[str, str, str]) -> None:
    install(monkeypatch, library)

    assert issubclass(optimizer_class(CUDA), FusedAdamW)
    assert optimizer_class(CUDA).kernel.library == library[0]
    assert optimizer_class(CPU) is torch.optim.AdamW


def test_another_package_called_apex_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "apex", SomethingElse=1)
    assert find_adam_kernel() is None
    assert find_rms_norm() is None


def groups() -> list[OptimizerGroup]:
    torch.manual_seed(0)
    matrix, bias, unused = torch.randn(4, 3), torch.randn(3), torch.randn(2)
    return [
        OptimizerGroup([matrix.requires_grad_(), unused.requires_grad_()], is_decayed=True),
        OptimizerGroup([bias.requires_grad_()], is_decayed=False),
    ]


@LIBRARIES
def test_it_updates_as_torch_does(monkeypatch: pytest.MonkeyPatch, library: tuple[str, str, str]) -> None:
    install(monkeypatch, library)
    config = OptimizerConfig(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    ours, theirs = (adamw(groups(), config, device) for device in (CUDA, CPU))
    calls: list[int] = []
    ours.register_step_post_hook(lambda *_: calls.append(1))
    for step in range(4):
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            matrix, unused, bias = (p for group in optimizer.param_groups for p in group["params"])
            matrix.grad = torch.randn(4, 3, generator=generator)
            bias.grad = torch.randn(3, generator=generator) if step else None  # its count lags behind
            assert unused.grad is None
            optimizer.step()

    assert len(calls) == 4
    found, wanted = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)
        assert ours.state[mine].keys() == theirs.state[other].keys()
        for key, value in theirs.state[other].items():
            torch.testing.assert_close(ours.state[mine][key], value)


def test_apexs_norm_is_found_with_its_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=lambda *_: None)
    assert find_rms_norm() is None
    find_rms_norm.cache_clear()
    put(monkeypatch, "fused_layer_norm_cuda")
    assert find_rms_norm() is not None

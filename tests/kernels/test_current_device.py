"""Kernels run on the GPU that their tensors are on, which need not be the current one."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sparsetrain_kernels
import torch
from sparsetrain_kernels.current_device import on_its_device
from torch import Tensor

PACKAGE = Path(sparsetrain_kernels.__file__).parent


def launchers(source: str) -> Iterator[ast.FunctionDef]:
    """Functions that launch a kernel themselves: `kernel[grid](...)`."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and any(
            isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) for call in ast.walk(function)
        ):
            yield function


HOSTS = {
    f"{path.parent.name}.{function.name}": function
    for path in sorted(PACKAGE.rglob("*.py"))
    if "import triton" in path.read_text()
    for function in launchers(path.read_text())
}


def test_the_functions_that_launch_are_found() -> None:
    assert {"block_sparse_attention.forward", "expert_ffn.forward", "permute.gather", "nm_linear.output"} <= set(HOSTS)


@pytest.mark.parametrize("name", HOSTS)
def test_a_function_that_launches_makes_the_device_of_its_arguments_the_current_one(name: str) -> None:
    assert "on_its_device" in [ast.unparse(decorator) for decorator in HOSTS[name].decorator_list]


def test_the_device_of_the_first_argument_is_current_while_the_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    @on_its_device
    def launch(x: Tensor, scale: float) -> tuple[float, bool]:
        return scale, current[-1] is x

    assert launch(torch.ones(1), scale=2.0) == (2.0, True)
    assert current == []

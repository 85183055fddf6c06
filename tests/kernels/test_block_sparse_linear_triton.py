"""Block-sparse linear in Triton: in its interpreter where there is no GPU, and on one where there is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from sparsetrain_kernels import WeightBlocks, block_sparse_linear
from sparsetrain_kernels.block_sparse_linear import reference
from sparsetrain_kernels.block_sparse_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT
from torch import Tensor

from sparsetrain.testing import assert_close, requires_gpu

pytest.importorskip("triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")),
    pytest.param(
        "cuda",
        marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ),
]
ON_BOTH = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@contextmanager
def by_triton() -> Iterator[None]:
    with OUTPUT.force("triton"), INPUT_GRADIENT.force("triton"), WEIGHT_GRADIENT.force("triton"):
        yield


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype).requires_grad_()


def random_layout(rows: int, columns: int, block: tuple[int, int], device: str) -> WeightBlocks:
    """Random blocks, with a row of blocks that is wholly dead."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[rows // 2] = False
    return WeightBlocks.from_mask(mask, block).to(device)


def results(function: object, x: Tensor, weight: Tensor, layout: WeightBlocks, bias: Tensor | None) -> list[Tensor]:
    y = function(x, weight, layout, bias)  # type: ignore[operator]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return [y, *torch.autograd.grad(y, inputs, dy)]


def check(shape: tuple[int, int, tuple[int, int], int], dtype: torch.dtype, device: str, *, packed: bool) -> None:
    """Output and gradients against the expanded weight in float64; NaN in dead blocks and in fresh memory."""
    rows, columns, block, tokens = shape
    layout = random_layout(rows, columns, block, device)
    alive = layout.unpack(torch.ones(layout.num_blocks, *block, device=device)).bool()
    weight = random(*layout.grid.shape, seed=0, dtype=dtype, device=device).detach().masked_fill(~alive, torch.nan)
    weight = (layout.pack(weight) if packed else weight).requires_grad_()
    x = random(tokens, layout.grid.shape[1], seed=1, dtype=dtype, device=device)
    bias = random(layout.grid.shape[0], 2, seed=2, dtype=dtype, device=device)[:, 0]  # not contiguous
    with by_triton(), fresh_memory_is_nan():
        found = results(block_sparse_linear, x, weight, layout, bias)
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (x, weight, bias))
    for ours, theirs in zip(found, results(reference.block_sparse_linear, x, weight, layout, bias), strict=True):
        assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


SMALL = {
    "one-block": (1, 1, (16, 16), 3),
    "tall-blocks": (3, 4, (32, 16), 70),
    "wide-blocks": (3, 2, (16, 128), 17),
    "two-tiles": (1, 2, (256, 16), 5),
    "no-token": (2, 2, (16, 16), 0),
}


@ON_BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["dense-stored", "packed"])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_kernels_equal_the_expanded_weights(
    shape: tuple[int, int, tuple[int, int], int], packed: bool, device: str
) -> None:
    check(shape, torch.float32, device, packed=packed)


@ON_BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_equal_the_expanded_weights_in_half_precision(dtype: torch.dtype, device: str) -> None:
    check((3, 4, (32, 16), 40), dtype, device, packed=False)


@requires_gpu
@pytest.mark.parametrize("packed", [False, True], ids=["dense-stored", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 128), (32, 256)], ids=str)
def test_kernels_of_every_tile_equal_the_expanded_weights(
    block: tuple[int, int], dtype: torch.dtype, packed: bool
) -> None:
    check((7, 9, block, 333), dtype, "cuda", packed=packed)


@ON_BOTH
def test_activations_may_be_stored_tokens_last(device: str) -> None:
    layout = random_layout(3, 2, (16, 16), device)
    x, weight, dy = (
        random(*shape, seed=0, dtype=torch.float32, device=device) for shape in ((9, 32), (48, 32), (9, 48))
    )
    x_last = x.detach().T.contiguous().T.requires_grad_()
    with by_triton():
        y, y_last = (
            block_sparse_linear(x, weight, layout),
            block_sparse_linear(x_last, weight, layout, tokens_last=True),
        )
        expected = torch.autograd.grad(y, (x, weight), dy)
        found = torch.autograd.grad(y_last, (x_last, weight), dy.T.contiguous().T)
    assert (y_last.stride(), found[0].stride()) == ((1, 9), (1, 9))
    assert all(map(torch.equal, (y_last, *found), (y, *expected)))


@ON_BOTH
def test_results_repeat_bitwise(device: str) -> None:
    layout = random_layout(3, 3, (16, 16), device)
    x, weight = (random(*shape, seed=0, dtype=torch.float32, device=device) for shape in ((40, 48), (48, 48)))
    with by_triton():
        first, second = (results(block_sparse_linear, x, weight, layout, None) for _ in range(2))
    assert all(map(torch.equal, first, second))


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sparsetrain_kernels.block_sparse_linear import triton as kernels

NAMES = ("BLOCK_IN", "BLOCK_OUT", "BLOCK_R", "BLOCK_C", "TILE_T", "TILE_IN", "TILE_OUT", "TILE_R", "TILE_C")
LISTS = {"starts_ptr", "others_ptr", "order_ptr", "rows_ptr", "columns_ptr"}
for kernel in (kernels._gather_products_kernel, kernels._weight_gradient_kernel):
    for form in (False, True):
        constants = dict.fromkeys(NAMES, 64) | dict(BY_COLUMN=form, PACKED=form, PRECISION="ieee", UPCAST=False)
        types, given, aligned = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            if name in constants:
                types[name], given[(place,)] = "constexpr", constants[name]
            elif name.endswith("_ptr"):
                types[name], aligned[(place,)] = "*i32" if name in LISTS else "*bf16", [["tt.divisibility", 16]]
            else:
                types[name] = "i32"
        compiled = compile(ASTSource(kernel, types, given, aligned), target=GPUTarget("cuda", 90, 32))
        print(kernel.__name__, compiled.metadata.shared <= 227 * 1024, "wgmma" in compiled.asm["ptx"])
"""


@pytest.mark.slow
def test_kernels_compile_to_tensor_core_products_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    names = ("_gather_products_kernel", "_gather_products_kernel", "_weight_gradient_kernel", "_weight_gradient_kernel")
    assert done.stdout.splitlines() == [f"{name} True True" for name in names], done.stderr

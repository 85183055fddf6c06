"""N:M linear layers in Triton and on sparse tensor cores: in the interpreter where there is no GPU, else on the GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from sparsetrain_kernels.nm_linear import NMPattern, NMSelection, nm_linear, reference, semi_structured
from sparsetrain_kernels.nm_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT
from sparsetrain_kernels.nm_linear.sparsify import sparsify_2_4 as sparsify_on_cpu
from torch import Tensor

from sparsetrain.testing import assert_close, requires_gpu

pytest.importorskip("triton")

ON_BOTH = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")),
        pytest.param(
            "cuda",
            marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
        ),
    ],
)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


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


def results(function: object, x: Tensor, weight: Tensor, selection: NMSelection, bias: Tensor | None) -> list[Tensor]:
    y = function(x, weight, selection, bias)  # type: ignore[operator]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return [y, *torch.autograd.grad(y, inputs, dy)]


def check(case: tuple[NMPattern, int, int, int], dtype: torch.dtype, device: str, *, compressed: bool) -> None:
    """Output and gradients against the masked weight in float64; NaN in what is not kept and in fresh memory."""
    pattern, outputs, inputs, tokens = case
    weight = random(outputs, inputs, seed=0, dtype=dtype, device=device)
    selection = NMSelection.largest(weight, pattern)
    weight = weight.detach().masked_fill(~selection.mask(), torch.nan)
    weight = (selection.compress(weight) if compressed else weight).requires_grad_()
    x, bias = (random(*shape, seed=1, dtype=dtype, device=device) for shape in ((tokens, inputs), (outputs,)))
    bias = torch.stack([bias, bias + 1], 1)[:, 0]  # not contiguous
    with OUTPUT.force("triton"), INPUT_GRADIENT.force("triton"), WEIGHT_GRADIENT.force("triton"), fresh_memory_is_nan():
        found = results(nm_linear, x, weight, selection, bias)
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (x, weight, bias))
    for ours, theirs in zip(found, results(reference.nm_linear, x, weight, selection, bias), strict=True):
        assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


SMALL = {
    "1:4": (NMPattern(1, 4, 16), 48, 24, 70),
    "5 of 7": (NMPattern(5, 7, 32), 32, 63, 3),  # programs own 30 of 32 places
    "40:64": (NMPattern(40, 64, 16), 32, 128, 5),  # more are kept of a group than a usual tile holds
    "two tiles": (NMPattern(1, 2, 256), 256, 8, 5),
    "no token": (NMPattern(1, 4, 16), 16, 8, 0),
}


@ON_BOTH
@pytest.mark.parametrize("compressed", [False, True], ids=["whole", "compressed"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_kernels_equal_the_masked_weights(case: tuple[NMPattern, int, int, int], compressed: bool, device: str) -> None:
    check(case, torch.float32, device, compressed=compressed)


@ON_BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_equal_the_masked_weights_in_half_precision(dtype: torch.dtype, device: str) -> None:
    check(SMALL["1:4"], dtype, device, compressed=False)


@requires_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vector", [16, 64, 128])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 8), (2, 4), (3, 5)])
def test_kernels_of_every_tile_equal_the_masked_weights(n: int, m: int, vector: int, dtype: torch.dtype) -> None:
    check((NMPattern(n, m, vector), 6 * vector, 40 * m, 333), dtype, "cuda", compressed=False)


@ON_BOTH
@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_few_tokens_of_compressed_weights_equal_the_masked_weights(
    dtype: torch.dtype, tokens: int, device: str
) -> None:
    weight, bias = (random(*shape, seed=0, dtype=dtype, device=device) for shape in ((35, 30), (35,)))
    selection = NMSelection.largest(weight, NMPattern(2, 5))
    values, x = selection.compress(weight), random(tokens, 30, seed=1, dtype=dtype, device=device)
    with OUTPUT.force("triton_of_few"), fresh_memory_is_nan():
        found = nm_linear(x, values, selection, bias)
    expected = reference.nm_linear(x.double(), values.double(), selection, bias.double())
    assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@ON_BOTH
def test_activations_may_be_stored_tokens_last(device: str) -> None:
    x, weight, dy = (
        random(*shape, seed=0, dtype=torch.float32, device=device) for shape in ((9, 16), (32, 16), (9, 32))
    )
    selection = NMSelection.largest(weight, NMPattern(1, 4, 16))
    x_last = x.detach().T.contiguous().T.requires_grad_()
    with OUTPUT.force("triton"), INPUT_GRADIENT.force("triton"), WEIGHT_GRADIENT.force("triton"):
        y, y_last = nm_linear(x, weight, selection), nm_linear(x_last, weight, selection, tokens_last=True)
        expected = torch.autograd.grad(y, (x, weight), dy)
        found = torch.autograd.grad(y_last, (x_last, weight), dy.T.contiguous().T)
    assert (y_last.stride(), found[0].stride()) == ((1, 9), (1, 9))
    assert all(map(torch.equal, (y_last, *found), (y, *expected)))


@ON_BOTH
def test_results_repeat_bitwise(device: str) -> None:
    x, weight = (random(*shape, seed=0, dtype=torch.float32, device=device) for shape in ((70, 16), (64, 16)))
    selection = NMSelection.largest(weight, NMPattern(1, 4, 16))
    with OUTPUT.force("triton"), INPUT_GRADIENT.force("triton"), WEIGHT_GRADIENT.force("triton"):
        first, second = (results(nm_linear, x, weight, selection, None) for _ in range(2))
    assert all(map(torch.equal, first, second))


@ON_BOTH
@pytest.mark.parametrize("dtype", [*TOLERANCE], ids=str)
def test_the_one_pass_sparsifier_equals_that_of_the_cpu(dtype: torch.dtype, device: str) -> None:
    from sparsetrain_kernels.nm_linear.triton import sparsify_2_4

    weight = torch.randint(-3, 4, (9, 132), generator=torch.Generator().manual_seed(0)).to(dtype)  # many ties
    weight[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1])
    for ours, theirs in zip(sparsify_2_4(weight.to(device)), sparsify_on_cpu(weight), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@requires_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_sparse_tensor_cores_equal_the_masked_weights(with_bias: bool, dtype: torch.dtype) -> None:
    if not semi_structured.is_available():
        pytest.skip("this torch has no cuSPARSELt, or this GPU is not supported by it")
    weight = random(192, 128, seed=0, dtype=dtype, device="cuda")
    selection = NMSelection.transposable(weight)
    x, bias = (random(*shape, seed=1, dtype=dtype, device="cuda") for shape in ((72, 128), (192,)))
    arguments = (x, weight, selection, bias if with_bias else None)
    with OUTPUT.force("semi_structured"), INPUT_GRADIENT.force("semi_structured"), WEIGHT_GRADIENT.force("dense"):
        found = results(nm_linear, *arguments)
    for ours, theirs in zip(found, results(reference.nm_linear, *arguments), strict=True):
        assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sparsetrain_kernels.nm_linear import triton as kernels

TYPES = {"columns_ptr": "*i32", "total_ptr": "*fp32", "mask_ptr": "*u8", "offsets_ptr": "*u8"}
products = (kernels._output_kernel, kernels._input_gradient_kernel, kernels._weight_gradient_kernel)
for kernel in (*products, kernels._sparsify_kernel, kernels._few_tokens_kernel):
    constants = dict(V=64, TILE_T=64, TILE_V=64, TILE_P=32, OWNED=32, PRECISION="ieee", UPCAST=False, TILE=256)
    if kernel is kernels._few_tokens_kernel:
        constants |= dict(TILE_T=8, TILE_N=16, TILE_P=64)
    types, given, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], given[(place,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            types[name], aligned[(place,)] = TYPES.get(name, "*bf16"), [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    compiled = compile(ASTSource(kernel, types, given, aligned), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, compiled.metadata.shared <= 227 * 1024, "mma" in compiled.asm["ptx"])
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    products = [f"{name} True True" for name in ("_output_kernel", "_input_gradient_kernel", "_weight_gradient_kernel")]
    assert done.stdout.splitlines() == [*products, "_sparsify_kernel True False", "_few_tokens_kernel True False"], (
        done.stderr
    )

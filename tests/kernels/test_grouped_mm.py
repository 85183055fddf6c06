"""Grouped products: both forms and their gradients against float64, and against torch's own operator."""

import pytest
import torch
from sparsetrain_kernels.grouped_mm import grouped_mm
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.test_expert_ffn import assert_near, gradients, random

COUNTS = {"uneven": [1, 17, 6], "empty": [0, 40, 0], "no-rows": [0, 0, 0]}
counts = pytest.mark.parametrize("counts", [pytest.param(c, id=name) for name, c in COUNTS.items()])
precisions = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def one_by_one(a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
    if b.dim() == 3:
        return torch.cat([rows @ matrix for rows, matrix in zip(a.split(counts), b, strict=True)])
    return torch.stack([left @ right for left, right in zip(a.split(counts, 1), b.split(counts), strict=True)])


@counts
@precisions
@pytest.mark.parametrize("form", ["by rows", "over rows"])
def test_products_and_gradients_equal_those_one_by_one(
    counts: list[int], dtype: torch.dtype, bound: float, form: str, device: str, poisoned_memory: None
) -> None:
    num_rows = sum(counts)
    if form == "by rows":
        inputs = random(num_rows, 20, seed=1, dtype=dtype), random(3, 36, 20, seed=2, dtype=dtype).mT
        grad = random(num_rows, 36, seed=3, dtype=dtype)
    else:
        inputs = random(num_rows, 20, seed=1, dtype=dtype).mT, random(num_rows, 36, seed=2, dtype=dtype)
        grad = random(3, 20, 36, seed=3, dtype=dtype)
    offs = ends(counts).to(device)
    found = gradients(lambda a, b: grouped_mm(a, b, offs), grad.to(device), [t.to(device) for t in inputs])
    expected = gradients(lambda a, b: one_by_one(a, b, counts), grad.double(), [t.double() for t in inputs])
    assert {t.dtype for t in found} == {dtype}
    assert_near([t.cpu() for t in found], expected, bound)


def test_it_is_torchs_grouped_mm(device: str) -> None:
    a_RK, b_EKN = (random(*s, seed=1, dtype=torch.bfloat16).to(device) for s in ((24, 16), (3, 16, 32)))
    offs = ends([4, 8, 12]).to(device)
    theirs = F.grouped_mm(a_RK, b_EKN, offs=offs)
    assert_near([grouped_mm(a_RK, b_EKN, offs)], [theirs], 1e-2)


def test_it_passes_torchs_own_checks(device: str) -> None:
    a_RK, b_EKN = (random(*s, seed=1, dtype=torch.float32).to(device) for s in ((5, 4), (3, 4, 6)))
    arguments = a_RK.requires_grad_(), b_EKN.requires_grad_(), ends([3, 0, 2]).to(device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sparsetrain.grouped_mm.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("a", "b", "offs", "message"),
    [
        ((4, 3), (2, 5, 6), [1, 4], "3 is not 5"),
        ((4,), (2, 5, 6), [1, 4], "expected 2 and 3, or 2 and 2"),
        ((4, 5), (2, 5, 6), [4], r"expected int32 of shape \(2,\)"),
        ((4, 5), (2, 5, 6), [1, 3], r"offs = \[1, 3\]: expected ends of groups that ascend to the number of rows, 4"),
        ((4, 5), (2, 5, 6), [5, 4], "ascend"),
    ],
    ids=["inner", "dimensions", "groups", "short", "descending"],
)
def test_what_does_not_fit_is_refused(a: tuple[int], b: tuple[int], offs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_mm(torch.ones(a), torch.ones(b), torch.tensor(offs, dtype=torch.int32))


def test_other_dtypes_are_refused() -> None:
    offs = torch.tensor([1, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected one dtype"):
        grouped_mm(torch.ones(4, 5), torch.ones(2, 5, 6).bfloat16(), offs)
    with pytest.raises(ValueError, match=r"offs is torch\.int64"):
        grouped_mm(torch.ones(4, 5), torch.ones(2, 5, 6), offs.long())

"""2:4 on NVIDIA's sparse tensor cores through cuSPARSELt, as torch exposes it.

The weight is compressed anew in each call, because training changes it; the search for the fastest algorithm of a shape
is made once and kept.
"""

import torch
from torch import Tensor

from sparsetrain_kernels.nm_linear.dense import whole_weight
from sparsetrain_kernels.nm_linear.pattern import NMPattern

MULTIPLE = 16
"""What sizes of the weight must be multiples of."""
TOKEN_MULTIPLE = 8

_plans: dict[tuple[object, ...], int] = {}


def is_available() -> bool:
    """Whether torch was built with cuSPARSELt and it supports this GPU."""
    return torch.cuda.is_available() and torch.backends.cusparselt.is_available()


def output(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    pattern: NMPattern,
    zeroed: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N]."""
    return _product(whole_weight(weight, mask_GK, columns_GP, pattern, x_TK.shape[1], zeroed), x_TK, bias_N)


def input_gradient(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    pattern: NMPattern,
    num_inputs: int,
    zeroed: bool,
) -> Tensor:
    """dy W [T, K], of a mask whose transpose is 2:4 too."""
    whole = whole_weight(weight, mask_GK, columns_GP, pattern, num_inputs, zeroed)
    return _product(whole.T.contiguous(), dy_TN, None)


def _product(sparse_OI: Tensor, a_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    """a sparseᵀ + bias [T, O]."""
    compressed = torch._cslt_compress(sparse_OI)
    plan = (sparse_OI.shape, len(a_TI), a_TI.dtype, a_TI.device, bias_O is None)
    if plan not in _plans:
        _plans[plan] = torch._cslt_sparse_mm_search(compressed, a_TI.T, bias=bias_O, transpose_result=True)
    return torch._cslt_sparse_mm(compressed, a_TI.T, bias=bias_O, transpose_result=True, alg_id=_plans[plan])

"""Vector n:m on a CPU: per group of outputs, one dense product with the inputs that the group keeps.

x is transposed once, so that gathering inputs copies whole rows; few enough tokens at a time that those stay in cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.nm_linear.dense import compress, expand
from sparsetrain_kernels.nm_linear.pattern import NMPattern

_CACHE_BYTES = 2 << 20
_TABLE_BYTES = 8 << 20
_MIN_TOKENS = 128


def output(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    zeroed: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N]."""
    values_GVP = _values(weight, columns_GP, pattern, x_TK.shape[1]).to(x_TK.dtype)
    y_TN = new_result(x_TK, len(x_TK), len(weight))
    for tokens in _slices(x_TK, columns_GP.shape[1]):
        x_KT = x_TK[tokens].T.contiguous()
        gathered_PT = x_KT.new_empty(columns_GP.shape[1], x_KT.shape[1])
        for group, y_TV in enumerate(y_TN[tokens].tensor_split(len(columns_GP), 1)):
            torch.index_select(x_KT, 0, columns_GP[group], out=gathered_PT)
            if bias_N is None:
                torch.mm(gathered_PT.T, values_GVP[group].T, out=y_TV)
            else:
                bias_V = bias_N[group * pattern.vector : (group + 1) * pattern.vector]
                torch.addmm(bias_V, gathered_PT.T, values_GVP[group].T, out=y_TV)
    return y_TN


def input_gradient(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    num_inputs: int,
    zeroed: bool,
) -> Tensor:
    """dy W [T, K]: all groups' products first, then each input's sum over the groups that keep it, in fp32 at least.

    Sums of rows of a table run on all cores; adding group after group into place would run on one.
    """
    values_GPV = _values(weight, columns_GP, pattern, num_inputs).to(dy_TN.dtype).transpose(1, 2)
    num_groups, num_kept = columns_GP.shape
    of_input = columns_GP.flatten()
    rows, counts_K = of_input.argsort(stable=True), of_input.bincount(minlength=num_inputs)
    starts_K = counts_K.cumsum(0) - counts_K
    dx_TK = new_result(dy_TN, len(dy_TN), num_inputs)
    for tokens in _slices(dy_TN, of_input.numel(), _TABLE_BYTES):
        dy_GVT = dy_TN[tokens].T.contiguous().view(num_groups, pattern.vector, -1)
        table_RT = torch.bmm(values_GPV, dy_GVT).view(num_groups * num_kept, -1)
        dx_TK[tokens] = embedding_bag(rows, table_RT, starts_K, mode="sum").T
    return dx_TK


def weight_gradient(
    dy_TN: Tensor,
    x_TK: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    compressed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """dyᵀ x at the kept weights: compressed [N, P], or [N, K] with zeros elsewhere.

    Each product is computed transposed, which in bf16 takes an eighth less.
    """
    x_KT = x_TK.T.contiguous()
    num_groups, num_kept = columns_GP.shape
    gathered_PT = x_KT.new_empty(num_kept, len(x_TK))
    values_GPV = x_TK.new_empty(num_groups, num_kept, pattern.vector)
    for group, dy_TV in enumerate(dy_TN.tensor_split(num_groups, 1)):
        torch.index_select(x_KT, 0, columns_GP[group], out=gathered_PT)
        torch.mm(gathered_PT, dy_TV, out=values_GPV[group])
    values_NP = values_GPV.transpose(1, 2).reshape(dy_TN.shape[1], num_kept).to(dtype)
    return values_NP if compressed else expand(values_NP, columns_GP, x_TK.shape[1], pattern.vector)


def _values(weight: Tensor, columns_GP: Tensor, pattern: NMPattern, num_inputs: int) -> Tensor:
    """Kept weights [G, V, P] of a whole or a compressed weight."""
    values_NP = weight if weight.shape[1] != num_inputs else compress(weight, columns_GP, pattern.vector)
    return values_NP.view(len(columns_GP), pattern.vector, columns_GP.shape[1])


def _slices(like_TX: Tensor, width: int, cache_bytes: int = _CACHE_BYTES) -> Iterator[slice]:
    """Tokens, so many at a time that `width` values of each take `cache_bytes`."""
    size = max(_MIN_TOKENS, cache_bytes // (width * like_TX.itemsize))
    return (slice(start, start + size) for start in range(0, len(like_TX), size))

"""Vector n:m on a CPU: per group of outputs, one dense product with the inputs that the group keeps.

All of it works on transposes: inputs are gathered as rows of xᵀ, which copies whole runs of memory, and products read
and write tokens along rows, which in bf16 takes a fifth less time than down columns. So activations that are stored
tokens last are read and written as they are; others are transposed on the way. Several groups at a time share a call,
because a group of 64 outputs alone is soon done; no more than what stays in cache until it has been multiplied.

T tokens, N outputs in G groups of V, K inputs, P = K·n/m kept inputs of a group; C of the groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.nm_linear.dense import compress, expand
from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.tokens_last import new_tokens

_GATHERED_BYTES = 4 << 20
_TABLE_BYTES = 4 << 20
_FEWEST_TOKENS = 128


def output(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    zeroed: bool,
    tokens_last: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N]."""
    values_GVP = _values(weight, columns_GP, pattern, x_TK.shape[1]).to(x_TK.dtype)
    bias_GV1 = None if bias_N is None else bias_N.view(*values_GVP.shape[:2], 1)
    y_TN = new_tokens(x_TK, len(x_TK), len(weight), tokens_last)
    y_GVT = y_TN.T.unflatten(0, values_GVP.shape[:2])  # type: ignore[no-untyped-call]
    for some, gathered_CPT in _gathered(x_TK, columns_GP):
        if tokens_last:
            _multiply(values_GVP[some], gathered_CPT, None if bias_GV1 is None else bias_GV1[some], y_GVT[some])
        else:  # a batch of products writes nothing but whole matrices at a bearable speed
            for group, gathered_PT in enumerate(gathered_CPT, some.start):
                _multiply(values_GVP[group], gathered_PT, None if bias_GV1 is None else bias_GV1[group], y_GVT[group])
    return y_TN


def input_gradient(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    num_inputs: int,
    zeroed: bool,
    tokens_last: bool,
) -> Tensor:
    """dy W [T, K]: all groups' products first, then each input's sum over the groups that keep it, in fp32 at least.

    Sums of rows of a table run on all cores; adding group after group into place would run on one.
    """
    values_GPV = _values(weight, columns_GP, pattern, num_inputs).to(dy_TN.dtype).transpose(1, 2)
    num_groups, num_kept = columns_GP.shape
    of_input = columns_GP.flatten()
    rows, counts_K = of_input.argsort(stable=True), of_input.bincount(minlength=num_inputs)
    starts_K = counts_K.cumsum(0) - counts_K
    dx_TK = new_tokens(dy_TN, len(dy_TN), num_inputs, tokens_last)
    tokens_of_a_table = max(_FEWEST_TOKENS, _TABLE_BYTES // (len(rows) * dy_TN.itemsize))
    for start in range(0, len(dy_TN), tokens_of_a_table):
        tokens = slice(start, start + tokens_of_a_table)
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
    """dyᵀ x at the kept weights: compressed [N, P], or [N, K] with zeros elsewhere."""
    num_groups, num_kept = columns_GP.shape
    dy_GTV = dy_TN.T.unflatten(0, (num_groups, pattern.vector)).transpose(1, 2)  # type: ignore[no-untyped-call]
    values_GPV = x_TK.new_empty(num_groups, num_kept, pattern.vector)
    for some, gathered_CPT in _gathered(x_TK, columns_GP):
        torch.bmm(gathered_CPT, dy_GTV[some], out=values_GPV[some])
    values_NP = values_GPV.transpose(1, 2).reshape(dy_TN.shape[1], num_kept).to(dtype)
    return values_NP if compressed else expand(values_NP, columns_GP, x_TK.shape[1], pattern.vector)


def _values(weight: Tensor, columns_GP: Tensor, pattern: NMPattern, num_inputs: int) -> Tensor:
    """Kept weights [G, V, P] of a whole or a compressed weight."""
    values_NP = weight if weight.shape[1] != num_inputs else compress(weight, columns_GP, pattern.vector)
    return values_NP.view(len(columns_GP), pattern.vector, columns_GP.shape[1])


def _gathered(x_TK: Tensor, columns_GP: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The inputs that some groups at a time keep, transposed [C, P, T]; each replaces those before it."""
    x_KT = x_TK.T.contiguous()
    num_groups, num_kept = columns_GP.shape
    bytes_of_group = num_kept * x_KT.shape[1] * x_KT.itemsize
    at_a_time = min(max(1, _GATHERED_BYTES // max(bytes_of_group, 1)), num_groups)
    memory_CPT = new_result(x_KT, at_a_time, num_kept, x_KT.shape[1])
    for start in range(0, num_groups, at_a_time):
        some = slice(start, min(start + at_a_time, num_groups))
        gathered_CPT = memory_CPT[: some.stop - start]
        torch.index_select(x_KT, 0, columns_GP[some].flatten(), out=gathered_CPT.flatten(0, 1))
        yield some, gathered_CPT


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """left @ right + bias of matrices, or of batches of them."""
    if bias is None:
        torch.matmul(left, right, out=out)
    elif left.ndim == 3:
        torch.baddbmm(bias, left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)

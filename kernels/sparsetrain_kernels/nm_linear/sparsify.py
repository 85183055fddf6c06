"""2:4 mask, compressed values and their places of a weight, at once."""

import torch
from torch import Tensor

from sparsetrain_kernels.nm_linear.masks import codes_2_4, mask_of_codes, offsets_of_codes


def sparsify_2_4(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest magnitudes of every four inputs; ties go to the lower index, NaN counts as largest.

    Args:
        weight_NK: [N, K], K a multiple of 4; float32, bfloat16, float16 or (not on a GPU) float64.

    Returns:
        The mask, bool [N, K]; the kept values [N, K/2]; their places in their fours, uint8 [N, K/2].

    Raises:
        ValueError: 4 does not divide the inputs, or the weight is not a matrix.
    """
    if weight_NK.ndim != 2 or weight_NK.shape[1] % 4:
        raise ValueError(f"weight is {list(weight_NK.shape)}: must be [outputs, inputs] with a multiple of 4 inputs")
    weight_NK = weight_NK.detach().contiguous()
    if weight_NK.is_cuda and weight_NK.dtype != torch.float64:
        from sparsetrain_kernels.nm_linear import triton

        return triton.sparsify_2_4(weight_NK)
    num_outputs, num_inputs = weight_NK.shape
    codes = codes_2_4(weight_NK)
    offsets = offsets_of_codes(codes)
    values = weight_NK.view(-1, 4).gather(1, offsets.view(-1, 2).long())
    halves = (num_outputs, num_inputs // 2)
    return mask_of_codes(codes).view(weight_NK.shape), values.view(halves), offsets.view(halves)

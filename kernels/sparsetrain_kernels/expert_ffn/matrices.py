"""Where the weights of experts lie in a GPU's memory: in stacks, or each in a tensor of its own.

Shapes: E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNED = 16
"""Elements. Kernels that know that matrices begin at multiples of it read and write several elements at once."""


class Matrices(NamedTuple):
    """A matrix, or a vector, of each expert, all of one shape and dtype."""

    base: Tensor
    """A stack of them, or the first."""
    place_E: Tensor | None = None
    """int64: how many units after `base` each begins; None in a stack."""
    unit: int = 1
    """Elements."""

    @property
    def mT(self) -> "Matrices":
        """Each transposed."""
        return self._replace(base=self.base.mT)


class Experts(NamedTuple):
    """All weights of experts, or their gradients; contiguous."""

    w_in: Matrices
    """[H, D] of each."""
    w_out: Matrices
    """[D, F] of each."""
    b_in: Matrices | None
    """[H] of each."""
    b_out: Matrices | None
    """[D] of each."""


def stacked(w_in_EHD: Tensor, w_out_EDF: Tensor, b_in_EH: Tensor | None, b_out_ED: Tensor | None) -> Experts:
    """Experts whose weights are in stacks; these are copied where they are not contiguous."""
    biases = [None if b is None else Matrices(b.contiguous()) for b in (b_in_EH, b_out_ED)]
    return Experts(Matrices(w_in_EHD.contiguous()), Matrices(w_out_EDF.contiguous()), *biases)


def listed(*lists: Sequence[Tensor] | None) -> list[Matrices | None]:
    """Matrices in tensors of their own, without a copy of them: only their places go to the device, in one transfer.

    Args:
        *lists: The tensors of each expert, as many in each list; or None, for which None is returned.

    Raises:
        ValueError: Tensors of a list differ in shape, dtype or device, or one is not contiguous.
    """
    present = [tensors for tensors in lists if tensors is not None]
    places = [_places(tensors) for tensors in present]
    unit = _ALIGNED if all(place % _ALIGNED == 0 for each in places for place in each) else 1
    place_LE = to_device([[place // unit for place in each] for each in places], torch.int64, present[0][0].device)
    found = iter([Matrices(tensors[0], place_LE[index], unit) for index, tensors in enumerate(present)])
    return [None if tensors is None else next(found) for tensors in lists]


def to_device(values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers of the host as a tensor there; the host does not wait for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Elements from the beginning of the first to that of each."""
    first = tensors[0]
    for expert, tensor in enumerate(tensors):
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"the weight of expert {expert} is {_told(tensor)} and that of expert 0 {_told(first)}: expected one "
                "shape, dtype and device"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"the weight of expert {expert}, {_told(tensor)}, is not contiguous: pass .contiguous()")
    return [(tensor.data_ptr() - first.data_ptr()) // first.element_size() for tensor in tensors]


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"

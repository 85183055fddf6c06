"""The implementations of block-sparse attention, by name; all have one signature.

Shapes: B samples, S queries, T keys, H query heads, K key/value heads, D head dim.
"""

import importlib.util
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparsetrain_kernels.block_layout.visibility import Visibility


class Forward(Protocol):
    """Attention."""

    def __call__(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible: Visibility, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [B, S, H, D], contiguous, in the dtype of q, and log-sum-exp [B, H, S] in float32 or better."""


class Backward(Protocol):
    """Gradients of attention."""

    def __call__(
        self,
        dout_BSHD: Tensor,
        dlse_BHS: Tensor | None,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        visible: Visibility,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, contiguous; `dout` has any strides."""


class Support(Protocol):
    """What an implementation can do."""

    def __call__(self, q_BSHD: Tensor, block: int) -> str | None:
        """Why it cannot run on such queries, and what would do; None where it can."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute block-sparse attention, forward and backward."""

    name: str
    forward: Forward
    backward: Backward
    unsupported: Support


def implementation(name: str) -> Implementation:
    """The implementation of a name.

    Modules are imported when first asked for: Triton takes a while, and need not be installed.

    Raises:
        ValueError: There is none of that name, or Triton is missing.
    """
    if name not in NAMES:
        raise ValueError(f"implementation={name!r}: must be one of {', '.join(NAMES)}, or None for the device's own")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("implementation='triton': Triton is not installed; install it, or pass implementation=None")
    module = importlib.import_module(f"sparsetrain_kernels.block_sparse_attention.{name}")
    return Implementation(name, module.forward, module.backward, module.unsupported)


def default_name(q: Tensor, block: int) -> str:
    """The implementation made for q's device, or the reference where that cannot run."""
    if q.is_cpu:
        return "cpu"
    if (
        q.is_cuda
        and importlib.util.find_spec("triton") is not None
        and implementation("triton").unsupported(q, block) is None
    ):
        return "triton"
    return "reference"


NAMES = ("reference", "cpu", "triton")

"""The implementations of block-sparse attention as operations of the dispatcher, and what tuning measures of them.

Shapes: B samples, S queries, T keys, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout import BlockLayout
from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.block_sparse_attention.dense import flash_attention_takes, hides_nothing
from sparsetrain_kernels.dispatch import DENSE, Implementation, Operation, Problem

NAMES = ("reference", DENSE, "cpu", "triton")

_LARGEST_BLOCK = 64
"""That times are told apart by: larger ones are computed as fast or faster."""
_TRITON_MIN_BLOCK, _TRITON_MAX_HEAD_DIM = 16, 256
_NEAR = (2.0, 0.5, 0.5, 1.0)
"""How far a problem may be from a measured one, log2 of the factor in B·H, S, T and D: times grow evenly with heads,
but not down to a single one, and which implementation is faster changes with the length of the sequence."""
_FEW_SCORES, _MANY_SCORES = 512**2, 4096**2
"""S·T of a head: up to the first a CPU is done with a dense mask before it has gathered blocks; beyond the second the
mask takes too much memory, however many of its entries are seen."""
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
_LENGTHS = {"cpu": (128, 256, 512, 1024), "cuda": (1024, 2048)}
_HEADS = {"cpu": 8, "cuda": 32}
_HEAD_DIMS = {"cpu": (64, 128), "cuda": (64, 128)}
_BLOCKS = {"cpu": (32, 64), "cuda": (64,)}
_DENSITIES = ((0.25, ""), (0.5, ""), (1.0, ""), (1.0, ", whole"))
"""With the word for what hides nothing; without it every block may be listed and documents hide some."""


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


def check_name(name: str, q: Tensor, block: int) -> None:
    """Raise ValueError unless there is an implementation of that name and it can run on such queries."""
    if name not in NAMES:
        raise ValueError(f"implementation={name!r}: must be one of {', '.join(NAMES)}, or None for the fastest")
    if name == "triton" and find_spec("triton") is None:
        raise ValueError("implementation='triton': Triton is not installed; install it, or pass implementation=None")
    unsupported: Support = _module(name).unsupported
    reason = unsupported(q, block)
    if reason is not None:
        raise ValueError(f"implementation={name!r}: {reason}")


def problem_of(
    q_BSHD: Tensor, k_BTKD: Tensor, visible: Visibility, *, lse_gradient: bool = False
) -> tuple[str, tuple[int, ...], float]:
    """Variant, sizes (B·H, S, T, D) and density for the dispatcher.

    Blocks count by the largest power of two that divides them, up to 64.
    """
    batch, num_queries, num_heads, dim = q_BSHD.shape
    num_keys = k_BTKD.shape[1]
    words = [f"block {min(_LARGEST_BLOCK, visible.block & -visible.block)}"]
    if visible.causal:
        words.append("causal")
    if hides_nothing(visible, num_queries, num_keys):
        words.append("whole")
    if lse_gradient:
        words.append("log-sum-exp")
    return ", ".join(words), (batch * num_heads, num_queries, num_keys, dim), visible.density


def _unmeasured(problem: Problem, candidates: Sequence[str]) -> tuple[str, str]:
    """What runs where nothing was measured near: blocks, as a dense mask has S·T entries, unless dense needs none."""
    words = problem.variant.split(", ")
    if not candidates:
        return DENSE, ""
    has_operator = problem.device == "cpu" or flash_attention_takes(problem.dtype, problem.sizes[3])
    if has_operator and "whole" in words and "log-sum-exp" not in words:
        return DENSE, "the layout hides nothing that torch's own operator would not"
    scores = problem.sizes[1] * problem.sizes[2]
    if problem.device == "cpu" and scores <= _FEW_SCORES:
        return DENSE, "the sequences are short"
    if problem.device == "cpu" and problem.density > 0.5 and scores <= _MANY_SCORES:
        return DENSE, "most blocks are seen"
    return candidates[0], "dense would make a mask of all tokens by all tokens"


def _suits_triton(problem: Problem) -> bool:
    block = int(problem.variant.split(",")[0].removeprefix("block "))
    fits = block >= _TRITON_MIN_BLOCK and problem.sizes[3] <= _TRITON_MAX_HEAD_DIM
    return fits and problem.dtype != torch.float64 and find_spec("triton") is not None


def _module(name: str) -> Any:
    """Imported when first asked for: Triton takes a while, and need not be installed."""
    return import_module(f"sparsetrain_kernels.block_sparse_attention.{name}")


def _late(name: str, what: str) -> Callable[..., Any]:
    return lambda *arguments: getattr(_module(name), what)(*arguments)


def _measured(operation: str) -> Callable[[str], Iterator[Problem]]:
    def problems(device: str) -> Iterator[Problem]:
        threads = torch.get_num_threads() if device == "cpu" else 1
        heads = _HEADS[device]
        for tokens, dim in product(_LENGTHS[device], _HEAD_DIMS[device]):
            every = product(_DTYPES[device], _BLOCKS[device], (", causal", ""), _DENSITIES)
            for dtype, block, causal, (density, whole) in every:
                if density * tokens < block:
                    continue
                variant = f"block {block}{causal}{whole}"
                yield Problem(operation, variant, device, dtype, (heads, tokens, tokens, dim), density, threads)

    return problems


def _random_visibility(problem: Problem) -> Visibility:
    """Random blocks: of each row an equal share of those that causality leaves."""
    words = problem.variant.split(", ")
    causal, block = "causal" in words, int(words[0].removeprefix("block "))
    heads, tokens = problem.sizes[:2]
    n = -(-tokens // block)
    scores = torch.rand(heads, n, n, generator=torch.Generator().manual_seed(0))
    if causal:
        scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu_(1), -1.0)
    reach = torch.arange(1, n + 1) if causal else torch.full((n,), n)
    kept = (problem.density * reach).round().clamp(min=1)
    mask = scores.argsort(-1, descending=True).argsort(-1) < kept[:, None]
    layout = BlockLayout.from_mask(mask, block).to(problem.device)
    visible = layout.visibility(1, tokens, tokens, causal=causal)
    return visible if "whole" in words else replace(visible, density=min(problem.density, 0.999))


def _random(problem: Problem) -> Tensor:
    heads, tokens, _, dim = problem.sizes
    return torch.randn(1, tokens, heads, dim, device=problem.device, dtype=problem.dtype)


def _forward_arguments(problem: Problem) -> Sequence[Any]:
    return *(_random(problem) for _ in range(3)), _random_visibility(problem), problem.sizes[3] ** -0.5


def _backward_arguments(problem: Problem) -> Sequence[Any]:
    q, k, v, visible, scale = _forward_arguments(problem)
    out, lse = FORWARD.implementations[DENSE].run(q, k, v, visible, scale)
    return _random(problem), None, q, k, v, out, lse, visible, scale


def _operation(name: str, what: str, arguments: Callable[[Problem], Sequence[Any]]) -> Operation:
    implementations = {
        DENSE: Implementation(_late(DENSE, what)),
        "cpu": Implementation(_late("cpu", what), ("cpu",)),
        "triton": Implementation(_late("triton", what), ("cuda",), _suits_triton),
        "reference": Implementation(_late("reference", what), ()),
    }
    return Operation(name, implementations, _measured(name), arguments, near=_NEAR, unmeasured=_unmeasured)


FORWARD = _operation("block_sparse_attention.output", "forward", _forward_arguments)
BACKWARD = _operation("block_sparse_attention.gradients", "backward", _backward_arguments)

"""The GPU that kernels are launched on."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Make the GPU of the first argument the current one while a function runs.

    Triton launches on the current GPU and reads the addresses it is given as that one's, wherever the tensors lie.
    """

    @wraps(launch)
    def launched(first: Tensor, *arguments: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return launch(first, *arguments, **named)

    return cast(
        Callable[Concatenate[Tensor, P], R], launched
    )  # mypy takes the name of the first argument for its type's

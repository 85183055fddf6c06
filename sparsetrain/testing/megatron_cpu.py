"""Have Megatron-Core, which is written for CUDA alone, train on CPUs over gloo: for tests, and to compare engines.

Megatron asks torch.cuda for the current device, for streams and for events even where it has no work for them. In the
context those questions are answered as if the CPU were a device whose only stream is always done. On a GPU nothing of
this is needed, and Megatron runs as it is.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


class _Done:
    """A stream, or an event on one: all work is over as soon as it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: "_Done") -> None:
        """Nothing to wait for; nor below."""

    def wait_event(self, _: "_Done") -> None:
        pass

    def wait(self, _: "_Done | None" = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self, _: "_Done | None" = None) -> None:
        pass

    def record_event(self, _: "_Done | None" = None) -> "_Done":
        return self

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Make torch.cuda answer for the CPU inside the context, in this process.

    Without effect where there is a GPU, so that what is tested there is Megatron as its users have it.
    """
    if torch.cuda.is_available():
        yield
        return
    with torch.device("meta"):
        torch.empty(0)  # what a device takes for factories is looked up once in a process: not to be the stand-ins
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in _stand_ins():
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        from megatron.core.tensor_parallel import random
        from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear

        # It would put off setting a state until CUDA is initialised, which is never.
        stack.enter_context(mock.patch.object(random, "_lazy_call", lambda call: call()))
        stack.enter_context(mock.patch.object(Linear, "backward", staticmethod(_autocast_as_before(Linear.backward))))
        yield


def _stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """What is replaced: owner, attribute, by what."""
    for name in _FACTORIES:
        yield torch, name, _on_cpu(getattr(torch, name))
    for name in ("Stream", "Event"):
        yield torch.cuda, name, _Done
    for name in ("current_stream", "default_stream"):
        yield torch.cuda, name, _Done
    yield torch.cuda, "stream", lambda _: contextlib.nullcontext()
    yield torch.cuda, "current_device", lambda: _CPU
    yield torch.cuda, "set_device", lambda _: None
    yield torch.cuda, "synchronize", lambda *_: None
    yield torch.cuda, "empty_cache", lambda: None
    # The states that Megatron keeps, one for each kind of dropout; the project draws from none.
    yield torch.cuda, "default_generators", {_CPU: torch.default_generator}
    for module in (torch.cuda, torch.cuda.random):
        yield module, "get_rng_state", lambda *_, **__: torch.get_rng_state()
        yield module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state)
    yield torch.cuda, "manual_seed", torch.manual_seed
    yield Tensor, "cuda", lambda tensor, *_, **__: tensor
    yield Tensor, "record_stream", lambda *_: None


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory of tensors that takes "cuda" for "cpu"."""

    def factory(*args: Any, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or _CPU).type == "cuda":
            kwargs["device"] = _CPU
        return make(*args, **kwargs)

    return factory


def _autocast_as_before(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that multiplies as the forward pass did: Megatron asks that of CUDA's autocast only."""

    def run(ctx: Any, gradient: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=gradient.dtype == torch.bfloat16):
            return backward(ctx, gradient)

    return run

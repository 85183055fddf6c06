"""AdamW through the kernels of apex or Transformer Engine, where one of them is installed; neither is ever required."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

_ADAM_W_MODE, _BIAS_CORRECTION = 1, 1


@dataclass(frozen=True)
class AdamKernel:
    """A kernel that updates all parameters of a group at once, and how it is launched."""

    library: str
    kernel: Any
    launch: Callable[..., object]
    """launch(kernel, no_op_flag, [gradients, parameters, first moments, second moments], lr, β₁, β₂, ε, step, mode,
    bias correction, weight decay), as both libraries define it."""


@cache
def find_adam_kernel() -> AdamKernel | None:
    """The kernel of the first library that imports, apex or Transformer Engine; None where neither does."""
    for library, kernels, launcher in (
        ("apex", "amp_C", "apex.multi_tensor_apply"),
        ("Transformer Engine", "transformer_engine_torch", "transformer_engine.pytorch.optimizers"),
    ):
        try:
            launch = import_module(launcher).multi_tensor_applier
            return AdamKernel(library, import_module(kernels).multi_tensor_adam, launch)
        except (ImportError, AttributeError):  # not installed, or another package of that name
            continue
    return None


class FusedAdamW(AdamW):
    """torch's AdamW, constructor, state and all, that updates through `kernel`; only on CUDA."""

    kernel: AdamKernel

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                # The count stays on the host, where the kernel wants it.
                zeros = torch.zeros_like(parameter, requires_grad=False)
                self.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        by_step: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            self.state[parameter]["step"] += 1
            by_step.setdefault(int(self.state[parameter]["step"]), []).append(parameter)
        for step, alike in by_step.items():
            states = [self.state[parameter] for parameter in alike]
            tensors = [
                _local(parameter.grad for parameter in alike if parameter.grad is not None),
                _local(alike),
                _local(state["exp_avg"] for state in states),
                _local(state["exp_avg_sq"] for state in states),
            ]
            no_op = torch.zeros(1, dtype=torch.int, device=tensors[0][0].device)
            hyper = (group["lr"], *group["betas"], group["eps"], step, _ADAM_W_MODE, _BIAS_CORRECTION)
            self.kernel.launch(self.kernel.kernel, no_op, tensors, *hyper, group["weight_decay"])


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def optimizer_class(device: torch.device) -> type[AdamW]:
    """What updates weights on a device: FusedAdamW on CUDA where one of the libraries is there, else torch's AdamW."""
    kernel = find_adam_kernel() if device.type == "cuda" else None
    if kernel is None:
        return AdamW
    return type("FusedAdamW", (FusedAdamW,), {"kernel": kernel})

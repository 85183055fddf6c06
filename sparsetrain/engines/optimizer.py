"""The optimizer of a phase."""

import torch
from torch import nn
from torch.optim import AdamW

from sparsetrain.config.run import OptimizerConfig
from sparsetrain.sharding import DescribesWeights


def build_optimizer(module: nn.Module, config: OptimizerConfig, device: torch.device) -> AdamW:
    """AdamW in its fused form, with weight decay on matrices and embeddings only, not on norms and biases.

    Where weights are stacked, as those of experts are, the first dimension counts them.

    Args:
        module: Plain, DDP-wrapped or sharded; every parameter that requires a gradient is optimised.
        config: Learning rate (the loop's schedule overwrites it each step), betas, eps, weight decay.
        device: Where the parameters live; its optimizer kernel is used.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    stacked = {
        id(parameter)
        for submodule in module.modules()
        if isinstance(submodule, DescribesWeights)
        for parameter in submodule.parameters()
    }
    # Stacks apart, in every layout: where the rest is DTensors they are plain, and one kernel does not take both.
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (is_stack, is_matrix): [] for is_stack in (False, True) for is_matrix in (True, False)
    }
    for parameter in parameters:
        is_stack = id(parameter) in stacked
        members[is_stack, parameter.dim() - is_stack >= 2].append(parameter)
    groups = [
        {"params": params, "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (_, is_matrix), params in members.items()
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )

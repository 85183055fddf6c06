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
    decaying, others = [], []
    for parameter in parameters:
        is_matrix = parameter.dim() - (id(parameter) in stacked) >= 2
        (decaying if is_matrix else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )

"""The optimizer of a phase."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sparsetrain.config.run import OptimizerConfig
from sparsetrain.engines.fused_adam import optimizer_class
from sparsetrain.sharding import DescribesWeights, PartOfModel, whole_model


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that are updated alike."""

    parameters: Sequence[Tensor]
    is_decayed: bool
    """Whether weight decay is theirs: on matrices and embeddings, not on norms and biases."""


def optimizer_groups(module: nn.Module) -> list[OptimizerGroup]:
    """Sort the parameters of a module that require a gradient; the groups are always the same, in the same order.

    A rank's part of a model has those of the whole, though one may be empty there.

    Where weights are stacked, as those of experts are, the first dimension counts them. Stacks are apart from the rest
    in every layout: where that is DTensors they are plain, and one kernel does not take both.
    """
    members, of_whole = _by_kind(module), _by_kind(whole_model(module))
    return [OptimizerGroup(members[kind], is_decayed=kind[1]) for kind in of_whole if of_whole[kind]]


def _by_kind(module: nn.Module) -> dict[tuple[bool, bool], list[Tensor]]:
    """Parameters by whether they are stacks, and whether they are, or stack, matrices."""
    stacked = {
        id(parameter)
        for submodule in module.modules()
        if isinstance(submodule, DescribesWeights) and not isinstance(submodule, PartOfModel)
        for parameter in submodule.parameters()
    }
    members: dict[tuple[bool, bool], list[Tensor]] = {
        (is_stack, is_matrix): [] for is_stack in (False, True) for is_matrix in (True, False)
    }
    for parameter in module.parameters():
        if parameter.requires_grad:
            is_stack = id(parameter) in stacked
            members[is_stack, parameter.dim() - is_stack >= 2].append(parameter)
    return members


def adamw(groups: Sequence[OptimizerGroup], config: OptimizerConfig, device: torch.device) -> AdamW:
    """AdamW in its fused form: torch's, or that of apex or Transformer Engine (see `optimizer_class`).

    Args:
        groups: What to optimise.
        config: Learning rate (the loop's schedule overwrites it each step), betas, eps, weight decay.
        device: Where the parameters live; its optimizer kernel is used.
    """
    return optimizer_class(device)(
        [
            {"params": list(group.parameters), "weight_decay": config.weight_decay if group.is_decayed else 0.0}
            for group in groups
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


def build_optimizer(module: nn.Module, config: OptimizerConfig, device: torch.device) -> AdamW:
    """AdamW over a module, plain, DDP-wrapped or sharded; see `optimizer_groups` and `adamw`."""
    return adamw(optimizer_groups(module), config, device)

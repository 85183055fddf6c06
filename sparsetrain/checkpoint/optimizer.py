"""What a torch optimizer holds besides its moments: hyperparameters and step counts, without a trace of the layout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparsetrain.errors import CheckpointError

_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}
"""How a group is computed, not what: left as the optimizer at hand has it."""


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Hyperparameters and step counts of every parameter group, as plain values for a checkpoint's `state`."""
    groups = [_group_state(optimizer, group) for group in optimizer.param_groups]
    counted = [group["steps"] for group in groups if group["steps"] != []]
    for group in groups:
        if group["steps"] == [] and counted:  # this rank has no parameter of the group; others step theirs as often
            group["steps"] = counted[0]
    return {"groups": groups}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` returned, and make room for the moments, which `load_checkpoint` fills.

    Raises:
        CheckpointError: The optimizer has other parameter groups.
    """
    if len(state["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(state['groups'])} parameter groups, and this one "
            f"{len(optimizer.param_groups)}; optimizer settings and model must be those of the checkpoint"
        )
    ensure_moments(optimizer)
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        _load_group(optimizer, group, saved)


def ensure_moments(optimizer: Optimizer) -> None:
    """Give every trainable parameter that has not been stepped the state it would start from: moments 0, step 0.

    Call it before `load_checkpoint`, which fills the moments in place.

    The names and types of that state are learned from a step of the same optimizer on a stand-in of one element, so
    neither weights nor hooks of the optimizer itself are touched.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                optimizer.state[parameter] = _initial_state(optimizer, group, parameter)


def _initial_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    stand_in = torch.zeros(1, dtype=local.dtype, device=local.device, requires_grad=True)
    stand_in.grad = torch.zeros_like(stand_in)
    settings = {key: value for key, value in group.items() if key in optimizer.defaults}
    probe = type(optimizer)([{"params": [stand_in], **settings}], **_constructor_defaults(optimizer))
    probe.step()
    return {key: _unstepped(value, parameter) for key, value in probe.state[stand_in].items()}


def _constructor_defaults(optimizer: Optimizer) -> dict[str, Any]:
    # decoupled_weight_decay is a default of AdamW that its constructor does not take.
    return {key: value for key, value in optimizer.defaults.items() if key != "decoupled_weight_decay"}


def _unstepped(value: Any, parameter: Tensor) -> Any:
    if not torch.is_tensor(value):
        return 0 if isinstance(value, int) else value
    if value.dim() == 0:
        return torch.zeros_like(value)
    return torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)


def _group_state(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        key: value.item() if torch.is_tensor(value) else value
        for key, value in group.items()
        if key not in _IMPLEMENTATION
    }
    steps = [_step_of(optimizer, parameter) for parameter in group["params"]]
    # Where all agree one number stands for them, which also fits a layout with other parameters in the group.
    return {"settings": settings, "steps": steps[0] if len(set(steps)) == 1 else steps}


def _step_of(optimizer: Optimizer, parameter: Tensor) -> float | None:
    step = optimizer.state.get(parameter, {}).get("step")
    return None if step is None else float(step)


def _load_group(optimizer: Optimizer, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved["settings"].items():
        if torch.is_tensor(group.get(key)):
            group[key].fill_(value)
        else:
            group[key] = value
    parameters = group["params"]
    steps = saved["steps"] if isinstance(saved["steps"], list) else [saved["steps"]] * len(parameters)
    if len(steps) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has counted steps of {len(steps)} parameters in a group, and this one has "
            f"{len(parameters)} there; load it with the layout that saved it"
        )
    for parameter, step in zip(parameters, steps, strict=True):
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"].fill_(step or 0) if torch.is_tensor(state["step"]) else int(step or 0)

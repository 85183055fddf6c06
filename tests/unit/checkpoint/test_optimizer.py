import pytest
import torch
from torch import nn

from sparsetrain.checkpoint import ensure_moments, load_optimizer_state, optimizer_state
from sparsetrain.errors import CheckpointError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, OPTIMIZERS[kind]([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.ones(3)
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_prepared_state_is_where_the_first_step_starts_from(kind):
    """A step from the prepared state does what a first step does, and leaves the same state."""
    plain, plain_optimizer = build(kind)
    prepared, optimizer = build(kind)
    ensure_moments(optimizer)
    for model, opt in ((plain, plain_optimizer), (prepared, optimizer)):
        step(model, opt)
    for expected, actual in zip(plain.parameters(), prepared.parameters(), strict=True):
        assert torch.equal(expected, actual)
        states = plain_optimizer.state[expected], optimizer.state[actual]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert value.dtype == states[1][key].dtype
            assert torch.equal(value, states[1][key])


def test_preparing_touches_neither_weights_nor_hooks_nor_existing_state():
    model, optimizer = build("adamw")
    step(model, optimizer)
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    weight, moment = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    ensure_moments(optimizer)
    assert calls == []
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)


def test_settings_are_restored_and_the_way_of_computing_is_not():
    _, saved = build("adamw")
    saved.param_groups[1]["lr"] = 0.5
    _, fused = build("adamw-fused")
    load_optimizer_state(fused, optimizer_state(saved))
    assert [group["lr"] for group in fused.param_groups] == [0.1, 0.5]
    assert fused.param_groups[0]["fused"] is True


def test_uneven_step_counts_are_restored_one_by_one():
    model, optimizer = build("adamw")
    optimizer.param_groups[0]["params"].append(optimizer.param_groups.pop()["params"][0])
    model.weight.grad = torch.ones(3, 4)
    optimizer.step()  # the bias had no gradient
    state = optimizer_state(optimizer)
    assert state["groups"][0]["steps"] == [1.0, None]
    other, fresh = build("adamw")
    fresh.param_groups[0]["params"].append(fresh.param_groups.pop()["params"][0])
    ensure_moments(fresh)
    load_optimizer_state(fresh, state)
    assert [fresh.state[p]["step"].item() for p in (other.weight, other.bias)] == [1.0, 0.0]


def test_other_groups_are_an_error():
    _, optimizer = build("adamw")
    state = optimizer_state(optimizer)
    optimizer.param_groups.pop()
    with pytest.raises(CheckpointError, match="2 parameter groups, and this one 1"):
        load_optimizer_state(optimizer, state)


def test_a_group_without_parameters_here_has_the_steps_of_the_others():
    """As on a pipeline stage without experts, whose state is loaded where there are some."""
    model, optimizer = build("adamw-fused")
    optimizer.add_param_group({"params": []})
    step(model, optimizer)

    assert [group["steps"] for group in optimizer_state(optimizer)["groups"]] == [1.0, 1.0, 1.0]
    load_optimizer_state(optimizer, optimizer_state(optimizer))

"""n:m recipes against their papers' equations, written out by hand, in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.dispatch import Problem
from sparsetrain_kernels.dispatch.table import Table
from torch import Tensor, nn

from sparsetrain.config import InvalidConfig, SparsityRule
from sparsetrain.errors import ConfigError, TrainingError
from sparsetrain.sparsity import Sparsifier, planned_densities
from sparsetrain.sparsity.matching import Parameter

LR, STEPS = 0.05, 12
SGD = torch.optim.SGD


def rule(method: str, pattern: str = "2:4", **keys: Any) -> SparsityRule:
    return SparsityRule(**{"params": "weight", "method": method, "pattern": pattern, **keys})


def layer(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def batches(steps: int = STEPS, inputs: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, inputs, dtype=torch.float64, generator=generator) for _ in range(steps)]


def largest(weight_OI: Tensor, n: int, m: int) -> Tensor:
    """Of every m inputs, by sorting Python numbers: the largest magnitudes, the lower index of equal ones."""
    mask = torch.zeros_like(weight_OI, dtype=torch.bool)
    for row in range(weight_OI.shape[0]):
        for start in range(0, weight_OI.shape[1], m):
            places = sorted(range(start, start + m), key=lambda at: (-abs(weight_OI[row, at].item()), at))
            mask[row, places[:n]] = True
    return mask


def train(model: nn.Linear, sparse: Sparsifier, steps: int = STEPS, first: int = 0) -> list[float]:
    optimizer = SGD(model.parameters(), lr=LR)
    if not sparse.masks():
        sparse.attach(model, optimizer)
    return [step(model, optimizer, x) for x in batches()[first : first + steps]]


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = model(x).square().sum() / 2
    loss.backward()
    optimizer.step()
    return float(loss)


def by_hand(method: str, n: int, m: int, *, decay: float = 0.0) -> Tensor:
    """The weight after STEPS steps of plain SGD on Σy²/2, as the paper's equations have it."""
    model = layer()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for t, x in enumerate(batches()):
        mask = largest(weight, n, m)
        d = max(0.0, 1 - t / 9) if method == "mdgf" else 0.0
        factor = mask.double() + (~mask).double() * d
        y = x @ (weight * factor).T + bias
        gradient = y.T @ x
        if method == "mdgf":
            gradient = gradient * factor
        gradient = gradient + decay * (~mask * weight)
        weight, bias = weight - LR * gradient, bias - LR * y.sum(0)
    return weight


@pytest.mark.parametrize(
    ("method", "keys", "decay"),
    [("ste", {}, 0.0), ("sr_ste", {}, 2e-4), ("sr_ste", {"mask_decay": 0.3}, 0.3), ("mdgf", {}, 0.0)],
    ids=["ste", "sr_ste", "sr_ste-0.3", "mdgf"],
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_steps_follow_the_equations(method: str, keys: dict[str, Any], decay: float, n: int, m: int) -> None:
    model = layer()

    train(model, Sparsifier([rule(method, f"{n}:{m}", **keys)], total_steps=STEPS))

    torch.testing.assert_close(model.weight.detach(), by_hand(method, n, m, decay=decay), rtol=1e-12, atol=1e-12)


def test_sdgf_masks_gradients_and_lowers_n_in_equal_stages() -> None:
    model, kept = layer(), []
    sparse = Sparsifier([rule("sdgf", "1:8")], total_steps=STEPS)
    optimizer = SGD(model.parameters(), lr=LR)
    sparse.attach(model, optimizer)
    for x in batches():
        n = round(sparse.density * 8)
        kept.append(n)
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        mask = largest(weight, n, 8)
        expected = weight - LR * ((x @ (weight * mask).T + bias).T @ x) * mask

        step(model, optimizer, x)

        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)

    assert kept == [7] * 3 + [4] * 3 + [2] * 3 + [1] * 3


@pytest.mark.parametrize(("method", "pattern"), [("bdwp", "2:8"), ("bdwp", "2:4"), ("ste", "2:4")])
def test_bdwp_alone_has_groups_along_the_outputs_in_the_input_gradient(method: str, pattern: str) -> None:
    model, x = layer(), batches(1)[0].requires_grad_()
    Sparsifier([rule(method, pattern)]).attach(model, None)
    n, m = map(int, pattern.split(":"))
    weight = model.weight.detach()
    seen = weight * largest(weight, n, m)
    back = weight * largest(weight.T, n, m).T if method == "bdwp" else seen

    y = model(x)
    (y.square().sum() / 2).backward()

    torch.testing.assert_close(y.detach(), x.detach() @ seen.T + model.bias.detach())
    assert x.grad is not None
    assert model.weight.grad is not None
    torch.testing.assert_close(x.grad, y.detach() @ back)
    torch.testing.assert_close(model.weight.grad, y.detach().T @ x.detach())


def test_transposable_masks_change_every_few_steps_and_end_dense() -> None:
    model, changed = layer(), []
    keys: dict[str, Any] = {"refresh_every_steps": 3, "mask_decay": 0.1}
    sparse = Sparsifier([rule("transposable", **keys)], total_steps=STEPS)
    optimizer = SGD(model.parameters(), lr=LR)
    sparse.attach(model, optimizer)
    for at, x in enumerate(batches()):
        (mask,) = sparse.masks().values()
        if at < STEPS - 2:
            assert (mask.sum(0) == 4).all()
            assert (mask.sum(1) == 4).all()
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        expected = weight - LR * ((x @ (weight * mask).T + bias).T @ x + 0.1 * (~mask * weight))
        step(model, optimizer, x)
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)
        if sparse.masks_changed:
            changed.append(at + 1)

    assert changed == [3, 6, 9, 10]  # a sixth of 12 steps is dense
    assert sparse.density == 1.0


def test_masks_of_ste_hold_between_refreshes_and_sad_counts_what_changes() -> None:
    model = layer()
    sparse = Sparsifier([rule("ste", refresh_every_steps=4)])
    optimizer = SGD(model.parameters(), lr=0.2)
    sparse.attach(model, optimizer)
    before = sparse.masks()["weight"]
    for at, x in enumerate(batches(8), start=1):
        step(model, optimizer, x)
        now = sparse.masks()["weight"]
        assert sparse.masks_changed == (at % 4 == 0)
        if at % 4:
            assert torch.equal(now, before)
        else:
            assert torch.equal(now, largest(model.weight.detach(), 2, 4))
            assert sparse.sad == int((now != before).sum())
        before = now
    assert sparse.flip_rate == sparse.sad / 64


@pytest.mark.parametrize("decay", ["linear", "exponential"])
def test_mask_decay_goes_from_one_to_nothing(decay: str) -> None:
    model, x = layer(), batches(1)[0]
    sparse = Sparsifier([rule("mdgf", decay=decay, decay_end=0.5)], total_steps=10).attach(model, None)
    dense = nn.functional.linear(x, model.weight, model.bias)
    weight, mask = model.weight.detach(), sparse.masks()["weight"]
    factors = []
    for at in range(6):
        unseen = (model(x) - nn.functional.linear(x, weight * mask, model.bias)).detach()
        whole = x @ (weight * ~mask).T
        factors.append((unseen / whole).mean().item())
        assert sparse.density == (1.0 if at < 5 else 0.5)
        sparse.after_step()

    expected = [1 - t / 5 if decay == "linear" else 0.01 ** (t / 5) for t in range(5)]
    assert factors == pytest.approx([*expected, 0.0], abs=1e-9)
    assert dense.isfinite().all()


def test_ties_go_to_the_lower_index_and_groups_of_zeros_stay_legal() -> None:
    model = layer()
    with torch.no_grad():
        model.weight[:] = 0.5
        model.weight[1] = 0.0
    sparse = Sparsifier([rule("ste")]).attach(model, None)

    assert sparse.masks()["weight"].tolist() == [[True, True, False, False] * 2] * 8
    assert model(batches(1)[0]).isfinite().all()


def test_the_decay_is_added_once_a_step_before_clipping() -> None:
    model = layer()
    sparse = Sparsifier([rule("sr_ste", mask_decay=0.5)])
    optimizer = SGD(model.parameters(), lr=LR)
    sparse.attach(model, optimizer)
    for x in batches(2):
        (model(x).square().sum() / 2).backward()
    assert model.weight.grad is not None
    plain, mask = model.weight.grad.clone(), sparse.masks()["weight"]

    sparse.mask_gradients()
    with_decay = model.weight.grad.clone()
    optimizer.step()

    torch.testing.assert_close(with_decay, plain + 0.5 * (~mask * model_weight_before(model, with_decay)))
    torch.testing.assert_close(model.weight.grad, with_decay)


def model_weight_before(model: nn.Linear, gradient: Tensor) -> Tensor:
    return model.weight.detach() + LR * gradient


@pytest.mark.parametrize("method", ["ste", "sr_ste", "mdgf", "sdgf", "bdwp", "transposable"])
def test_a_phase_resumed_in_its_middle_goes_on_bitwise(method: str) -> None:
    one = rule(method, refresh_every_steps=None if method == "bdwp" else 2)
    straight = layer()
    losses = train(straight, Sparsifier([one], total_steps=STEPS))
    model, sparse = layer(), Sparsifier([one], total_steps=STEPS)
    train(model, sparse, steps=5)
    masks, state = sparse.masks(), copy.deepcopy(sparse.state_dict())
    sparse.detach()

    again, optimizer = layer(), None
    optimizer = SGD(again.parameters(), lr=LR)
    resumed = Sparsifier([one], total_steps=STEPS).attach(again, optimizer)
    again.load_state_dict(model.state_dict())
    resumed.load_masks(masks)
    resumed.load_state_dict(state)

    assert [step(again, optimizer, x) for x in batches()[5:]] == losses[5:]
    assert torch.equal(again.weight, straight.weight)


@pytest.fixture
def gathering_is_fast():
    """A table that says so of every product of `layer(outputs=32)` with vectors of 16."""
    times = {
        Problem(
            f"nm_linear.{product}",
            f"vector[16] {n}:8",
            "cpu",
            torch.float64,
            (5, 32, 8),
            n / 8,
            torch.get_num_threads(),
        ): {"dense": 2.0, "gather": 1.0}
        for n in (1, 2, 4, 7)
        for product in ("output", "input_gradient", "weight_gradient")
    }
    dispatch.use_table("cpu", Table("here", times))
    yield
    dispatch.use_table("cpu", None)


@pytest.mark.parametrize("method", ["ste", "sr_ste", "mdgf", "sdgf"])
def test_kernels_train_what_masked_dense_products_do(method: str, gathering_is_fast: None) -> None:
    one = rule(method, "vector[16] 1:8")
    fast, slow = layer(outputs=32), layer(outputs=32)
    sparse = Sparsifier([one], total_steps=STEPS)
    losses = train(fast, sparse)
    gathered = {choice.problem.operation for choice in dispatch.choices() if choice.implementation == "gather"}
    dispatch.use_table("cpu", Table("nothing measured"))
    expected = train(slow, Sparsifier([one], total_steps=STEPS))

    assert "nm_linear.output" in gathered
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(fast.weight, slow.weight)
    (mask,) = sparse.masks().values()
    assert torch.equal(mask[:16], mask[:1].expand(16, -1))
    assert int(mask[0].sum()) == int(mask[16].sum()) == 1


def test_folding_leaves_the_function_and_plain_layers() -> None:
    model, x = layer(), batches(1)[0]
    sparse = Sparsifier([rule("ste", "1:4")]).attach(model, None)
    seen = model(x).detach()

    sparse.fold()

    assert torch.equal(model(x).detach(), seen)
    assert int(model.weight.count_nonzero()) == 16
    assert "forward" not in vars(model)


def test_autocast_multiplies_in_bf16_and_gradients_stay_in_fp32() -> None:
    for method in ("ste", "bdwp"):
        model = layer().float()
        x = batches(1)[0].float().requires_grad_()
        Sparsifier([rule(method)]).attach(model, None)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()

        assert y.dtype == torch.bfloat16
        assert model.weight.grad is not None
        assert model.weight.grad.dtype == torch.float32


def test_weights_that_are_not_finite_stop_the_run() -> None:
    model = layer()
    sparse = Sparsifier([rule("ste")]).attach(model, None)
    with torch.no_grad():
        model.weight[0, 0] = math.nan

    with pytest.raises(TrainingError, match="weight is not finite after step 1"):
        sparse.after_step()


def test_plans_know_what_is_multiplied() -> None:
    weights = [Parameter("weight", (8, 8), False)]
    rows = {
        method: planned_densities([rule(method)], weights, total_steps=12)[0].tolist()
        for method in ("ste", "mdgf", "sdgf", "transposable")
    }

    assert rows["ste"] == [0.5] * 12
    assert rows["mdgf"] == [1.0] * 9 + [0.5] * 3
    assert rows["sdgf"] == [0.75] * 6 + [0.5] * 6
    assert rows["transposable"] == [0.5] * 10 + [1.0] * 2


def test_recipes_say_which_gradients_they_compute() -> None:
    found = {
        method: Sparsifier([rule(method)], total_steps=4).attach(layer(), None).weight_gradient_densities()["weight"]
        for method in ("ste", "sr_ste", "bdwp", "transposable", "mdgf", "sdgf")
    }

    assert found == {"ste": 1.0, "sr_ste": 1.0, "bdwp": 1.0, "transposable": 1.0, "mdgf": 1.0, "sdgf": 0.75}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "4:2"}, "pattern = '4:2': n:m keeps n=4 of every m=2 weights: choose 1 <= n < m <= 64"),
        ({"pattern": "0:4"}, "choose 1 <= n < m"),
        ({"pattern": "1:128"}, "m <= 64"),
        ({"pattern": "unstructured", "sparsity": 0.5}, "method=sr_ste needs n:m, for example 2:4, not unstructured"),
        ({"sparsity": 0.75}, "sparsity = 0.75: pattern=2:4 makes it 0.5; leave sparsity out"),
        ({"mask_decay": -1.0}, "mask_decay = -1.0: must be at least 0.0"),
        ({"mask_decay": 2.0}, "mask_decay = 2.0: must be below 1.0"),
        ({"dense_tail": 0.2}, "dense_tail = 0.2: only for method=transposable, not sr_ste; remove it"),
        ({"method": "ste", "mask_decay": 1e-4}, "only for method=sr_ste or transposable, not ste"),
        ({"method": "transposable", "pattern": "1:4"}, "method=transposable has masks for 2:4 alone, not for 1:4"),
        ({"method": "bdwp", "refresh_every_steps": 5}, "method=bdwp chooses its masks anew after every step"),
        ({"schedule": "cubic"}, "method=sr_ste has a schedule of its own; remove it"),
        ({"distribution": "erk"}, "pattern=2:4 is equal in all weights; remove it"),
        ({"criterion": "random"}, "method=sr_ste keeps the largest magnitudes; remove it"),
        ({"refresh_every_steps": 0}, "refresh_every_steps = 0: must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_rule_is_one_error_with_key_value_and_fix(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        SparsityRule(**{"params": "*", "method": "sr_ste", "pattern": "2:4"} | keys)

    assert len(caught.value.problems) == 1
    assert message in str(caught.value)


def test_a_pattern_that_does_not_fit_is_told_with_the_weight() -> None:
    with pytest.raises(ConfigError, match=r"pattern = '2:4': m=4 does not divide weight of shape \[8, 6\]"):
        Sparsifier([rule("ste")]).attach(nn.Linear(6, 8), None)
    with pytest.raises(ConfigError, match=r"whose m divides both its dimensions"):
        Sparsifier([rule("bdwp")]).attach(nn.Linear(8, 6), None)
    with pytest.raises(ConfigError, match=r"method = ste: needs nn.Linear layers, and weight is in none of its own"):
        Sparsifier([rule("ste")]).attach(nn.Bilinear(8, 8, 8), None)
    with pytest.raises(ConfigError, match=r"method=mdgf is placed on a known number of steps: pass total_steps"):
        Sparsifier([rule("mdgf")])


def test_a_phase_that_keeps_the_masks_trains_n_of_m_and_a_dense_one_frees_them() -> None:
    model = layer()
    optimizer = SGD(model.parameters(), lr=LR)
    first = Sparsifier([rule("sr_ste")]).attach(model, optimizer)
    for x in batches(3):
        step(model, optimizer, x)
    first.fold()
    masks = first.masks()
    kept = Sparsifier([rule("sr_ste")], hold=True).attach(model, optimizer, masks=masks)
    for x in batches(3):
        step(model, optimizer, x)

    assert torch.equal(kept.masks()["weight"], masks["weight"])
    assert torch.equal(model.weight != 0, masks["weight"])

    kept.fold()
    Sparsifier(()).attach(model, optimizer)
    step(model, optimizer, batches(1)[0])

    assert (model.weight != 0).all()

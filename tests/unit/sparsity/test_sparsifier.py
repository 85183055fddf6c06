"""The Sparsifier on one rank: exact zeros under any optimizer, phases, state, and methods yet to come."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.config import SparsityRule
from sparsetrain.errors import CheckpointError, ConfigError, TrainingError
from sparsetrain.sharding import WeightShard, weight_shards
from sparsetrain.sparsity import Sparsifier, sparsifier
from sparsetrain.sparsity.methods import Method
from sparsetrain.sparsity.weights import SparseWeight

STATIC = SparsityRule(params="*", method="static", sparsity=0.75)
PRUNE = SparsityRule(
    params="*", method="prune", sparsity=0.75, schedule={"kind": "geometric", "every_steps": 2, "start": 0.2}
)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 8))


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(6, 12)).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def assert_zeroed(sparse: Sparsifier, shards: Sequence[WeightShard]) -> None:
    """Weight, master, gradient and moments are +0 where the mask says zero, and the counts are right."""
    masks = sparse.masks()
    assert masks
    for shard in shards:
        if shard.name not in masks:
            continue
        dead = ~masks[shard.name]
        tensors = [shard.local_weight(), shard.local_master(), *shard.local_moments().values()]
        grad = shard.local_grad()
        for tensor in [*tensors, *([] if grad is None else [grad])]:
            at_dead = tensor[dead]
            assert (at_dead == 0).all(), shard.name
            assert not torch.signbit(at_dead).any()
    for layer in sparse.report():
        assert layer.nonzeros == int(masks[layer.name].sum())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adamw-amsgrad-l2": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adamw-without-eps": lambda p: torch.optim.AdamW(p, lr=0.05, eps=0.0),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "muon": lambda p: torch.optim.Muon([one for one in p if one.dim() == 2], lr=0.01),
}


@pytest.mark.parametrize("rule", [STATIC, PRUNE], ids=["static", "prune"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeroed_weights_gradients_and_moments_stay_exactly_zero(name: str, rule: SparsityRule) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 2)  # moments that are there when the first masks are made
    sparse = Sparsifier([rule], total_steps=12).attach(model, optimizer)
    shards = weight_shards(model, optimizer)
    assert_zeroed(sparse, shards)
    for _ in range(12):
        train(model, optimizer, 1)
        assert_zeroed(sparse, shards)
    assert sparse.nonzeros == (240 + 160) // 4
    assert [int((shard.local_weight() != 0).sum()) for shard in shards[::4]] == [60, 40]


def test_every_optimizer_said_to_keep_zeros_is_tested() -> None:
    tested = {type(make([nn.Parameter(torch.ones(2, 2))])) for make in OPTIMIZERS.values()}
    assert set(sparsifier._KEEPS_ZEROS) <= tested


def test_gradients_of_a_closure_are_masked_inside_the_step() -> None:
    for pass_by_name in (False, True):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        sparse = Sparsifier([STATIC]).attach(model, optimizer)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses = [optimizer.step(closure=closure) if pass_by_name else optimizer.step(closure) for _ in range(3)]
        assert all(torch.isfinite(loss) for loss in losses)
        assert_zeroed(sparse, weight_shards(model, optimizer))


def test_lbfgs_leaves_zeroed_weights_at_zero() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    sparse = Sparsifier([STATIC]).attach(model, optimizer)
    torch.manual_seed(1)
    inputs = torch.randn(6, 12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < before
    sparse.mask_gradients()
    assert_zeroed(sparse, weight_shards(model, optimizer))


def test_a_norm_taken_after_mask_gradients_is_that_of_what_lives() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = Sparsifier([STATIC]).attach(model, optimizer)
    loss_of(model).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    sparse.mask_gradients()
    sparse.mask_gradients()
    masks = sparse.masks()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name] * masks[name] if name in masks else before[name])


def test_a_gradient_that_overflowed_does_not_reach_zeroed_weights() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = Sparsifier([STATIC]).attach(model, optimizer)
    loss_of(model).backward()
    weight = model[0].weight
    weight.grad[~sparse.masks()["0.weight"]] = torch.nan
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert_zeroed(sparse, weight_shards(model, optimizer))


def test_pruning_follows_its_timetable_never_regrows_and_reports_flips() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparse = Sparsifier([PRUNE], total_steps=30).attach(model, optimizer)
    planned = st.sparsity.planned_densities([PRUNE], st.sparsity.describe_parameters(model), total_steps=30)[0]
    masks = sparse.masks()
    updates = 0
    for step in range(30):
        assert sparse.density == pytest.approx(planned[step], abs=1 / 160)
        train(model, optimizer, 1)
        new = sparse.masks()
        changed = sum(int((new[name] != masks[name]).sum()) for name in new)
        assert not any((new[name] & ~masks[name]).any() for name in new)
        if changed:
            assert sparse.flip_rate == changed / sparse.numel
            updates += 1
        masks = new
    assert sparse.step == 30
    assert sparse.density == 0.25
    assert updates == sum(planned[1:] != planned[:-1])
    assert {layer.name: layer.density for layer in sparse.report()} == sparse.densities()


def test_random_masks_depend_on_the_seed_and_the_name_alone() -> None:
    def masks(seed: int) -> dict[str, Tensor]:
        model = mlp()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -1, 1)
        return Sparsifier([STATIC], seed=seed).attach(model, None).masks()

    first, again, other = masks(0), masks(0), masks(1)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_without_an_optimizer_the_caller_says_when_a_step_is_taken() -> None:
    model = mlp()
    sparse = Sparsifier([STATIC]).attach(model, None)
    loss_of(model).backward()
    sparse.mask_gradients()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad + 1
    sparse.after_step()
    assert sparse.step == 1
    assert_zeroed(sparse, weight_shards(model))


def test_separate_masters_are_zeroed_too() -> None:
    weight, master = torch.ones(4, 4, dtype=torch.bfloat16), torch.arange(16.0).view(4, 4)
    whole = (slice(0, 4), slice(0, 4))
    shard = WeightShard("weight", (4, 4), whole, None, 0, lambda: weight, lambda: None, lambda: master, dict)
    rule = SparsityRule(params="weight", method="static", criterion="magnitude", sparsity=0.5)
    model = nn.Linear(4, 4, bias=False)
    sparse = Sparsifier([rule]).attach(model, None, shards=[shard])
    assert_zeroed(sparse, [shard])
    assert master.count_nonzero() == weight.count_nonzero() == 8
    assert master[:2].count_nonzero() == 0  # the master decides: by the weight all tie


def test_half_precision_and_float64_weights_are_zeroed() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = mlp().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        sparse = Sparsifier([PRUNE], total_steps=6).attach(model, optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(6, 12, dtype=dtype)).square().sum().backward()
            optimizer.step()
        assert sparse.density == 0.25
        assert_zeroed(sparse, weight_shards(model, optimizer))


def test_weights_that_are_not_finite_stop_the_update_and_are_named() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier([PRUNE], total_steps=10).attach(model, optimizer)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"3\.weight holds NaN or infinite weights \(1 of 2 weights do\)"):
        take_steps(optimizer, 10)


def take_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.step()


def test_a_dense_phase_lets_zeroed_weights_learn() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparse = Sparsifier([STATIC]).attach(model, optimizer)
    train(model, optimizer, 3)
    dead = ~sparse.masks()["0.weight"]
    sparse.detach()
    dense = Sparsifier([]).attach(model, optimizer, masks=sparse.masks())
    assert (model[0].weight[dead] == 0).all()
    train(model, optimizer, 1)
    assert (model[0].weight[dead] != 0).any()
    assert (dense.density, dense.numel, dense.masks(), dense.report()) == (1.0, 0, {}, [])


def test_a_later_phase_holds_masks_or_prunes_on_from_them() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    first = Sparsifier([STATIC.model_copy(update={"sparsity": 0.5})]).attach(model, optimizer)
    train(model, optimizer, 3)
    first.detach()
    held = Sparsifier([PRUNE], hold=True).attach(model, optimizer, masks=first.masks())
    train(model, optimizer, 3)
    assert held.density == 0.5
    assert_zeroed(held, weight_shards(model, optimizer))
    held.detach()
    further = Sparsifier([PRUNE], total_steps=10).attach(model, optimizer, masks=held.masks())
    assert further.density == 0.5
    train(model, optimizer, 10)
    assert further.density == 0.25
    for name, mask in further.masks().items():
        assert not (mask & ~first.masks()[name]).any()


def test_attaching_again_goes_on_from_the_masks_that_are_there_with_a_new_optimizer() -> None:
    model = mlp()
    old = torch.optim.SGD(model.parameters(), lr=0.05)
    sparse = Sparsifier([PRUNE], total_steps=10).attach(model, old)
    train(model, old, 10)
    masks = sparse.masks()
    new = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparse.attach(model, new)
    train(model, new, 1)
    train(model, old, 1)
    assert sparse.step == 1  # the old optimizer's steps are followed no more
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks().items())


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped() -> None:
    def started() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, optimizer, Sparsifier([PRUNE], total_steps=20).attach(model, optimizer)

    model, optimizer, sparse = started()
    train(model, optimizer, 9)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparse.masks(), sparse.state_dict()))
    rng = torch.get_rng_state()
    train(model, optimizer, 11)

    resumed, its_optimizer, again = started()
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    again.load_masks(saved[2])
    again.load_state_dict(saved[3])
    assert again.state_dict() == saved[3]
    torch.set_rng_state(rng)
    train(resumed, its_optimizer, 11)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.report() == sparse.report()
    assert again.step == sparse.step == 20


def test_masks_and_state_of_other_rules_are_refused() -> None:
    model = mlp()
    sparse = Sparsifier([STATIC]).attach(model, None)
    masks, state = sparse.masks(), sparse.state_dict()
    with pytest.raises(CheckpointError, match=r"3\.weight should have shape \[8, 20\], not missing"):
        sparse.load_masks({"0.weight": masks["0.weight"]})
    with pytest.raises(CheckpointError, match=r"not \[20, 8\]"):
        sparse.load_masks({**masks, "3.weight": masks["3.weight"].T})
    fewer = Sparsifier([SparsityRule(params="0", method="static", sparsity=0.5)]).attach(model, None)
    with pytest.raises(CheckpointError, match="1 sparsity rules over 2 weights, and this run has 1 over 1"):
        fewer.load_state_dict(state)


def test_a_schedule_without_a_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sparsity\[1\]\.schedule=geometric .* total_steps"):
        Sparsifier([STATIC, PRUNE])


def test_it_works_on_modules_that_know_nothing_of_us() -> None:
    """torch's own encoder layer keeps q, k and v in a bare parameter; the names are as in Hugging Face models."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(16, 8)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
            self.lm_head = nn.Linear(8, 16, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.embed_tokens(tokens)
            for layer in self.layers:
                hidden = layer(hidden)
            return self.lm_head(hidden)

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rules = [
        st.SparsityRule(params="*.in_proj_weight", method="static", sparsity=0.5, pattern="block[4,4]"),
        st.SparsityRule(
            params="*", method="prune", sparsity=0.8, distribution={"kind": "global", "floor": 0.1},
            schedule={"kind": "cubic", "every_steps": 1},
        ),
    ]  # fmt: skip
    sparse = st.Sparsifier(rules, total_steps=6)
    sparse.attach(model, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randint(16, (2, 5))).flatten(0, 1), torch.arange(10)).backward()
        optimizer.step()
    assert_zeroed(sparse, weight_shards(model, optimizer))
    by_rule = [[layer for layer in sparse.report() if layer.rule == rule] for rule in (0, 1)]
    assert [layer.density for layer in by_rule[0]] == [0.5, 0.5]
    owned = sum(layer.numel for layer in by_rule[1])
    assert sum(layer.nonzeros for layer in by_rule[1]) == owned - int(0.8 * owned + 0.5)
    assert min(layer.nonzeros - int(0.1 * layer.numel) for layer in by_rule[1]) >= 0
    assert (model.embed_tokens.weight != 0).all()


class GrowByGradient(Method):
    """A method of the kind to come: at each step, masks where the dense gradient is largest, applied in the forward."""

    zeros_in_parameter = False
    seen: Tensor

    def first_masks(self, weights: Sequence[SparseWeight]) -> list[Tensor]:
        return self.choose(weights, 0, within=False)

    def is_due(self, step: int) -> bool:
        return step == 2

    def see_gradients(self, weights: Sequence[SparseWeight]) -> None:
        self.seen = weights[0].shard.local_grad().clone()

    def next_masks(self, weights: Sequence[SparseWeight], step: int) -> list[Tensor]:
        return [self.seen.abs() >= self.seen.abs().median(), *(weight.bits.bool() for weight in weights[1:])]


@pytest.mark.parametrize("in_parameter", [False, True])
def test_a_method_sees_dense_gradients_when_due_and_says_where_zeros_stand(
    in_parameter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sparsifier.METHODS, "static", GrowByGradient)
    monkeypatch.setattr(GrowByGradient, "zeros_in_parameter", in_parameter)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = Sparsifier([STATIC]).attach(model, optimizer)
    assert (model[0].weight != 0).all() == (not in_parameter)
    (method,) = sparse._methods
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        dense = model[0].weight.grad.clone()
        optimizer.step()
        assert hasattr(method, "seen") == (step == 1)
    assert torch.equal(method.seen, dense)
    assert torch.equal(sparse.masks()["0.weight"], dense.abs() >= dense.abs().median())
    assert (model[0].weight != 0).all() == (not in_parameter)


class Follower(nn.Linear):
    """A layer that notes what it is told."""

    def zeros_follow(self, pattern: str | None) -> None:
        self.told = [*getattr(self, "told", []), pattern]

    def masks_changed(self) -> None:
        self.zeros_seen = int((self.weight == 0).sum())


def test_layers_are_told_of_their_zeros() -> None:
    model = nn.Sequential(Follower(8, 8), Follower(8, 8), Follower(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    rules = [
        SparsityRule(
            params="0",
            method="prune",
            pattern="block[2,2]",
            sparsity=0.5,
            schedule={"kind": "stepwise", "steps": [[0.0, 0.25], [0.5, 0.5]]},
        ),
        SparsityRule(params="1", method="static", pattern="vector[4] 1:4"),
    ]
    sparsifier = Sparsifier(rules, total_steps=2).attach(model, optimizer)
    assert [getattr(layer, "told", []) for layer in model] == [["block[2,2]"], ["vector[4] 1:4"], []]
    assert [model[0].zeros_seen, model[1].zeros_seen] == [16, 48]
    for _ in range(2):
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
    assert model[0].zeros_seen == 32
    sparsifier.detach()
    assert [layer.told[-1] for layer in model[:2]] == [None, None]

"""Masks do not depend on the layout: plain, DDP, fully_shard and flat-partitioned weights, at 1, 2 and 4 ranks."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import SparsityRule
from sparsetrain.errors import TrainingError
from sparsetrain.sharding import FlatPartition, WeightShard, weight_shards
from sparsetrain.sparsity import Sparsifier
from sparsetrain.sparsity.choose import choose_masks
from sparsetrain.sparsity.weights import SparseWeight, update_masks
from sparsetrain.testing import run_distributed

STEPS = 6
DISTRIBUTIONS = ("uniform", "erk", "global", {"kind": "global", "floor": 0.3})
RULES = [
    SparsityRule(
        params="*",
        method="prune",
        pattern=pattern,
        distribution=distribution,
        criterion=criterion,
        sparsity=0.7,
        schedule={"kind": "geometric", "every_steps": 2, "start": 0.2, "end": 0.9},
    )
    for pattern, distribution, criterion in itertools.product(
        ("unstructured", "block[2,2]"), DISTRIBUTIONS, ("magnitude", "random")
    )
]
TIES = (0.5, -0.5, 0.0, 0.25)

Masks = dict[str, Tensor]


def build() -> nn.Module:
    """Shapes that no number of ranks divides: a rank of four holds nothing of the last one, and blocks are cut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 14), nn.GELU(), nn.Linear(14, 20, bias=False), nn.GELU(), nn.Linear(20, 2))
    with torch.no_grad():
        for linear in model[::2]:  # many equal magnitudes at the threshold, in one weight and over several
            linear.weight.view(-1)[::3] = torch.tensor(TIES).repeat(24)[: -(-linear.weight.numel() // 3)]
    return model


class Trained:
    """A model in one layout, trained on the same global batch at every number of ranks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)

    def shards(self) -> list[WeightShard]:
        return weight_shards(self.model, self.optimizer)

    def loss(self, step: int) -> Tensor:
        torch.manual_seed(step)
        return self.model(torch.randn(5, 8)).square().sum()  # the same on all ranks: the mean of gradients is theirs

    def step(self, step: int, sparse: Sparsifier) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()


class FlatTrained(Trained):
    """ZeRO by hand: one flat buffer cut over the ranks, an optimizer on this rank's piece of a separate master."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.group = dist.group.WORLD
        rank, world_size = dist.get_rank(), dist.get_world_size()
        whole = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
        self.padding = -len(whole) % world_size
        self.pieces = (rank, world_size)
        self.weight = self.cut(whole)
        self.master = nn.Parameter(self.weight.clone())
        self.optimizer = torch.optim.AdamW([self.master], lr=0.05, weight_decay=0.1)

    def cut(self, whole: Tensor) -> Tensor:
        rank, world_size = self.pieces
        return nn.functional.pad(whole, (0, self.padding)).chunk(world_size)[rank].clone()

    def shards(self) -> list[WeightShard]:
        partition = FlatPartition(
            {name: tuple(parameter.shape) for name, parameter in self.parameters.items()},
            self.group,
            weight=lambda: self.weight,
            grad=lambda: self.master.grad,
            master=self.master.detach,
            moments=lambda: {key: value for key, value in self.optimizer.state[self.master].items() if value.dim()},
        )
        return list(partition.shards())

    def step(self, step: int, sparse: Sparsifier) -> None:
        grads = torch.autograd.grad(self.loss(step), list(self.parameters.values()))
        self.master.grad = self.cut(torch.cat([grad.reshape(-1) for grad in grads]))
        self.optimizer.step()
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """What an engine does after an update: every rank gets all pieces. The model sees what the masks left."""
        self.weight.copy_(self.master)
        pieces = [torch.empty_like(self.weight) for _ in range(self.pieces[1])]
        dist.all_gather(pieces, self.weight)
        whole, at = torch.cat(pieces), 0
        for parameter in self.parameters.values():
            parameter.copy_(whole[at : at + parameter.numel()].view(parameter.shape))
            at += parameter.numel()


def sharded(replicas: int) -> Callable[[], Trained]:
    def make() -> Trained:
        world_size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))
        model = build()
        fully_shard(model[2], mesh=mesh if replicas > 1 else mesh["shard"])
        fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
        return Trained(model)

    return make


def layouts() -> dict[str, Callable[[], Trained]]:
    found: dict[str, Callable[[], Trained]] = {
        "plain": lambda: Trained(build()),
        "ddp": lambda: Trained(DistributedDataParallel(build())),
        "fully_shard": sharded(replicas=1),
        "flat": lambda: FlatTrained(build()),
    }
    return found | ({"hybrid": sharded(replicas=2)} if dist.get_world_size() == 4 else {})


def whole(shards: list[WeightShard], parts: list[Tensor]) -> dict[str, Tensor]:
    """The whole of each weight's parts, float32 by name: every part at its global indices, added up over the group."""
    found = [torch.zeros(shard.global_numel) for shard in shards]
    for shard, part, one in zip(shards, parts, found, strict=True):
        one[shard.global_indices().view(-1)] = part.reshape(-1).float()
    joined = torch.cat(found)
    if shards[0].group is not None:
        dist.all_reduce(joined, group=shards[0].group)
    pieces = joined.split([shard.global_numel for shard in shards])
    return {shard.name: piece.view(shard.global_shape) for shard, piece in zip(shards, pieces, strict=True)}


def chosen(trained: Trained, rule: SparsityRule) -> list[Masks]:
    """Masks of the weights as they are: fresh ones, then further ones within those."""
    by_name = {shard.name: shard for shard in trained.shards() if len(shard.global_shape) == 2}
    weights = [SparseWeight.dense(by_name[name]) for name in sorted(by_name)]
    found = []
    for sparsity, within in ((0.4, False), (0.7, True)):
        update_masks(weights, choose_masks(weights, rule, sparsity, seed=5, within=within))
        found.append(whole([weight.shard for weight in weights], [weight.bits.bool() for weight in weights]))
        assert [weight.nonzeros for weight in weights] == [int(mask.sum()) for mask in found[-1].values()]
    return found


def after_training(trained: Trained, rules: list[SparsityRule]) -> tuple[Masks, Masks]:
    """Masks and weights after real steps, with everything that must be zero checked after each."""
    shards = trained.shards()
    sparse = Sparsifier(rules, total_steps=STEPS, seed=5).attach(trained.model, trained.optimizer, shards=shards)
    if isinstance(trained, FlatTrained):
        trained.gather()
    for step in range(STEPS):
        trained.step(step, sparse)
        for shard in shards:
            if (mask := sparse.masks().get(shard.name)) is None:
                continue
            zeroed = [shard.local_weight(), shard.local_master(), shard.local_grad(), *shard.local_moments().values()]
            assert len(zeroed) == 5 or shard.local_numel == 0
            for tensor in zeroed:
                assert tensor is None or (tensor[~mask] == 0).all()
    assert sparse.density < 0.5
    local = sparse.masks()
    masks = whole(
        [shard for shard in shards if shard.name in local], [local[s.name] for s in shards if s.name in local]
    )
    assert sparse.nonzeros == sum(int(mask.sum()) for mask in masks.values())
    return masks, whole(shards, [shard.local_weight() for shard in shards])


def a_weight_that_is_not_finite_on_one_rank_is_an_error_on_all() -> None:
    trained = sharded(replicas=1)()
    if dist.get_rank() == 1:
        trained.shards()[0].local_weight()[0] = torch.nan
    rule = SparsityRule(params="*", method="static", criterion="magnitude", sparsity=0.5)
    with pytest.raises(TrainingError, match=r"0\.weight holds NaN or infinite weights \(1 of 3"):
        Sparsifier([rule]).attach(trained.model, None)


def everything() -> tuple[list[list[Masks]], Masks]:
    """Of the plain layout at this number of ranks, once every other layout has been found equal to it."""
    made = {name: make() for name, make in layouts().items()}
    by_layout = {name: [chosen(trained, rule) for rule in RULES] for name, trained in made.items()}
    for name, found in by_layout.items():
        for rule, ours, plain in zip(RULES, found, by_layout["plain"], strict=True):
            for mine, theirs in zip(ours, plain, strict=True):
                for weight in theirs:
                    assert torch.equal(mine[weight], theirs[weight]), (name, rule.pattern, rule.distribution, weight)
    # The unstructured global floor and the uniform blocks, in one model: two rules that train together.
    rules = [RULES[12].model_copy(update={"params": ("0", "4")}), RULES[6]]
    expected, weights = after_training(made["plain"], rules)
    for name, trained in made.items():
        if name != "plain":
            masks, values = after_training(trained, rules)
            for weight in expected:
                assert torch.equal(masks[weight], expected[weight]), (name, weight)
                torch.testing.assert_close(values[weight], weights[weight], msg=f"{name} {weight}")
    if dist.get_world_size() > 1:
        a_weight_that_is_not_finite_on_one_rank_is_an_error_on_all()
    return by_layout["plain"], expected


@pytest.fixture(scope="module")
def at_one_rank() -> tuple[list[list[Masks]], Masks]:
    return run_distributed(everything, 1, timeout_s=250)[0]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_masks_are_bitwise_the_same_in_every_layout_at_every_number_of_ranks(
    world_size: int, at_one_rank: tuple[list[list[Masks]], Masks]
) -> None:
    chosen_at_one, trained_at_one = at_one_rank
    for chosen_here, trained_here in run_distributed(everything, world_size, timeout_s=280):
        for rule, ours, expected in zip(RULES, chosen_here, chosen_at_one, strict=True):
            for mine, theirs in zip(ours, expected, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[name], theirs[name]) for name in theirs), rule
        assert all(torch.equal(trained_here[name], trained_at_one[name]) for name in trained_at_one)

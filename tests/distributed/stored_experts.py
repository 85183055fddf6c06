"""Models whose experts live in a store, and gradients for them that are exact in any order of summation.

Contributions to gradients are multiples of 1/8 and worlds are powers of two.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sparsetrain.moe import Experts, ExpertSpec
from sparsetrain.moe.placement import Placement, own_evenly
from sparsetrain.parallel.fssdp import ExpertGroups, ExpertStore

NUM_LAYERS, NUM_EXPERTS = 3, 5  # 15 experts: uneven over 2 and 4 ranks
SPECS = (ExpertSpec(dim=6, ffn_dim=4), ExpertSpec(dim=3, ffn_dim=5, activation="gelu", bias=True))
PATHS = [f"layers.{layer}.moe.experts" for layer in range(NUM_LAYERS)]
Work = Callable[[], None]


class StoredExperts(nn.Module):
    """A layer's experts, described through the store that holds them."""

    def __init__(self, store: ExpertStore, layer: int) -> None:
        super().__init__()
        self.store, self.layer = store, layer

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        return self.store.describe_layer(path)

    def shards_of_weights(self, path, moments, replica_rank):
        return self.store.shards_of_layer(self.layer, path, moments)


def model_of(experts: Sequence[nn.Module]) -> nn.Module:
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"moe": nn.ModuleDict({"experts": each})}) for each in experts)}
    )


def single_process(spec: ExpertSpec, seed: int = 0) -> list[Experts]:
    torch.manual_seed(seed)
    return [Experts(spec, NUM_EXPERTS) for _ in range(NUM_LAYERS)]


def stored(spec: ExpertSpec, groups: ExpertGroups, experts: Sequence[Experts]) -> ExpertStore:
    store = ExpertStore(spec, PATHS, NUM_EXPERTS, own_evenly(NUM_LAYERS, NUM_EXPERTS, groups.size), groups)
    for layer, each in enumerate(experts):
        store.adopt(layer, each)
    return store


def plans(store: ExpertStore, seed: int | None) -> list[Placement]:
    """Replicas by chance; None: none at all."""
    alone = [Placement.of_owners(owner_E, store.groups.size) for owner_E in store.owners_LE]
    if seed is None:
        return alone
    draw = np.random.default_rng(seed)
    return [Placement(plan.owner_E, plan.holders_ED | (draw.random(plan.holders_ED.shape) < 0.5)) for plan in alone]


def stored_layers(store: ExpertStore) -> list[nn.Module]:
    return [StoredExperts(store, layer) for layer in range(store.num_layers)]


class Backward(torch.autograd.Function):
    """Does what it is told when the backward pass comes by."""

    @staticmethod
    def forward(ctx, x: Tensor, work: Work) -> Tensor:
        ctx.work = work
        return x.clone()

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        ctx.work()
        return dx, None


def run_backward(work: Work) -> None:
    Backward.apply(torch.ones(1, requires_grad=True), work).sum().backward()


def contribution(source: int, layer: int, expert: int, name: str, shape: tuple[int, ...], batch: int) -> Tensor:
    """What a rank's tokens add to an expert's gradient in one micro-batch; expert 4 of layer 1 never has a token."""
    if (layer, expert) == (1, 4):
        return torch.zeros(shape)
    seed = hash((source, layer, expert, len(name), name == "w_in", batch)) % 2**31
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 8


def compute(store: ExpertStore, placements: Sequence[Placement], batch: int, dtype: torch.dtype) -> None:
    """A backward pass: every source's contribution is added on one of the expert's holders."""
    rank, size = store.groups.rank, store.groups.size
    first_source = store.groups.replica_rank * size
    store.queue_finish()
    for layer in reversed(range(NUM_LAYERS)):
        replicas = store.start_gather(layer, placements[layer], dtype)
        local = store.gradients(layer, replicas)
        for slot, expert in enumerate(local.experts):
            holders = np.flatnonzero(placements[layer].holders_ED[expert])
            for source in range(size):
                if holders[(source + expert) % len(holders)] == rank:
                    for name, shape in store.spec.shapes.items():
                        part = contribution(first_source + source, layer, expert, name, shape, batch)
                        getattr(local, name)[slot].add_(part)
        store.start_reduce(layer, replicas)
        store.queue_finish()


def expected_gradient(experts: Sequence[Experts], batches: Sequence[int], world_size: int) -> Iterator[Tensor]:
    """The mean over ranks of the sum over micro-batches, for each parameter of the single-process experts."""
    for layer, each in enumerate(experts):
        for name, shape in each.spec.shapes.items():
            yield torch.stack(
                [
                    sum(
                        (
                            contribution(source, layer, expert, name, shape, batch)
                            for source in range(world_size)
                            for batch in batches
                        ),
                        torch.zeros(shape),
                    )
                    / world_size
                    for expert in range(NUM_EXPERTS)
                ]
            )

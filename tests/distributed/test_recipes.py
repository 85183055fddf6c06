"""n:m recipes do not depend on the layout: DDP and fully_shard over two ranks are one process, step by step."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import SparsityRule
from sparsetrain.sharding import weight_shards
from sparsetrain.sparsity import Sparsifier
from sparsetrain.testing import run_distributed

STEPS = 6
RULES = [
    SparsityRule(params="*", method="ste", pattern="2:4"),
    SparsityRule(params="*", method="sr_ste", pattern="1:4", mask_decay=0.1),
    SparsityRule(params="*", method="sr_ste", pattern="vector[4] 1:4"),
    SparsityRule(params="*", method="mdgf", pattern="2:4"),
    SparsityRule(params="*", method="sdgf", pattern="1:4"),
    SparsityRule(params="*", method="bdwp", pattern="2:4"),
    SparsityRule(params="*", method="transposable", pattern="2:4", refresh_every_steps=2),
]


def build() -> nn.Sequential:
    """12 outputs over two ranks: the squares of a transposable mask are cut by the border between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 4)).double()


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for linear in model[::2]:
        fully_shard(linear, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(
    rule: SparsityRule, wrap: Callable[[nn.Sequential], nn.Module]
) -> tuple[list[float], list[float], Sparsifier]:
    """Losses and densities of every step, and the Sparsifier; the batch is the same on all ranks."""
    model = wrap(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    sparse = Sparsifier([rule], total_steps=STEPS).attach(model, optimizer)
    losses, densities = [], []
    for step in range(STEPS):
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        densities.append(sparse.density)
    sparse.fold()
    for shard in weight_shards(model, optimizer):
        if shard.name in sparse.masks():
            mask, weight = sparse.masks()[shard.name], shard.local_weight()
            assert not weight[~mask].any(), shard.name
    return losses, densities, sparse


def check_layouts() -> None:
    for rule in RULES:
        losses, densities, plain = train(rule, lambda model: model)
        for wrap in (sharded, DistributedDataParallel):
            found, dense, sparse = train(rule, wrap)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-12, atol=0)
            assert dense == densities, rule.method
            shards = {weight.shard.name: weight.shard for weight in sparse._all()}
            for name, whole in plain.masks().items():
                assert torch.equal(sparse.masks()[name], shards[name].cut(whole)), (rule.method, name)


def check_masters_decide_under_mixed_precision() -> None:
    """Masks of bf16 weights are those of the fp32 weights that the optimizer has: no ties that are none."""
    model = build().float()
    with torch.no_grad():
        for linear in model[::2]:
            linear.weight.copy_(1 + torch.randperm(linear.weight.numel()).view_as(linear.weight) * 1e-6)
    masters = {f"{at}.weight": model[at].weight.detach().clone() for at in (0, 2, 4)}
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=bf16)
    sparse = Sparsifier([RULES[0]]).attach(model, None)
    model(torch.randn(3, 8)).sum().backward()
    for weight in sparse._all():
        kept = masters[weight.shard.name].view(-1, 4).topk(2).indices
        expected: Tensor = torch.zeros(kept.shape[0], 4, dtype=torch.bool).scatter_(1, kept, True)
        mask = sparse.masks()[weight.shard.name]
        assert torch.equal(mask, weight.shard.cut(expected.view(weight.shard.global_shape)))


def check_all() -> None:
    check_layouts()
    check_masters_decide_under_mixed_precision()


def test_two_ranks_train_as_one_process_does() -> None:
    run_distributed(check_all, world_size=2)

"""Layers that leave out zeros train like masked dense ones in every layout, while masks move."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from sparsetrain_kernels import dispatch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import ModelConfig, RunConfig, SparsityRule
from sparsetrain.models import SparseLinear, Transformer, initialize_, sparse_linear, use_sparse_linears
from sparsetrain.models.sparse_linear import PRODUCTS
from sparsetrain.sharding import weight_modules
from sparsetrain.sparsity import Sparsifier
from sparsetrain.testing import assert_close, run_distributed
from sparsetrain.training.sparse_layers import SparseLayers

VOCAB, SEQ_LEN, BATCH, STEPS = 64, 16, 4, 4
CONFIG = ModelConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=64, init_std=0.2)
RULES = [
    SparsityRule(
        params="*.ffn.*",
        method="prune",
        pattern="block[8,8]",
        sparsity=0.75,
        schedule={"kind": "stepwise", "steps": [[0.0, 0.5], [0.5, 0.75]]},
    ),
    SparsityRule(params="*.attention.*", method="static", pattern="vector[8] 1:4"),
]

RUN = RunConfig(name="run", model=CONFIG, train={"tokens": 1024, "batch_tokens": 64, "micro_batch_size": 2})


def build(*, sparse):
    model = Transformer(CONFIG, VOCAB, SEQ_LEN)
    initialize_(model, CONFIG, seed=3)
    if sparse:
        use_sparse_linears(model)
    return model


def replicated():
    return DistributedDataParallel(build(sparse=True))


def fully_sharded():
    model = build(sparse=True)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def linears_sharded_alone():
    model = build(sparse=True)
    for layer in model.layers:
        for linear in (layer.ffn.gate, layer.ffn.up, layer.ffn.down):
            fully_shard(linear)
    return fully_shard(model)


def fully_sharded_and_checkpointed():
    model = build(sparse=True)
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
        fully_shard(model.layers[i])
    return fully_shard(model)


def trained(model, samples, *, scale, precision):
    """Weights and moments after some steps, by name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    sparsifier = Sparsifier(RULES, total_steps=STEPS)
    sparsifier.attach(model, optimizer)
    told = SparseLayers(model, sparsifier, RUN, seq_len=SEQ_LEN, device="cpu")
    for _ in range(STEPS):
        told.notices()  # may be asked while weights are sharded
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(*samples)
        (loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for _, _, parameters in weight_modules(model):
        for name, parameter in parameters.items():
            found[name] = parameter.detach()
            found[f"moment of {name}"] = optimizer.state[parameter]["exp_avg"]
    return found


@contextlib.contextmanager
def gathering():
    """Have all products leave out zeros, and hidden activations stored tokens last, whatever was measured."""
    with contextlib.ExitStack() as forced:
        seconds = staticmethod(lambda *case, tokens_last: 1.0 if tokens_last else 2.0)
        forced.enter_context(mock.patch.object(sparse_linear._Between, "_seconds", seconds))
        for kind in ("block_sparse_linear", "nm_linear"):
            for product in PRODUCTS:
                forced.enter_context(dispatch.OPERATIONS[f"{kind}.{product}"].force("gather"))
        yield


def check_layouts_against_masked_dense():
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(VOCAB, (2, BATCH, SEQ_LEN), generator=generator)
    part = whole[:, rank * BATCH // size : (rank + 1) * BATCH // size]
    scale = 1 / whole[0].numel()
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
        wanted = trained(build(sparse=False), whole, scale=scale, precision=precision)
        for layout in (replicated, fully_sharded, linears_sharded_alone, fully_sharded_and_checkpointed):
            with gathering():
                model = layout()
                found = trained(model, part, scale=scale * size, precision=precision)
            linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
            assert sum(linear.is_beside_tokens_last for linear in linears) == 3 * CONFIG.num_layers
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert_close(found[name], tensor, rtol=10 * tolerance, atol=tolerance)
                if ".ffn." in name and not name.startswith("moment"):
                    assert int((tensor == 0).sum()) == tensor.numel() * 3 // 4
                    whole_weight = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
                    assert torch.equal(whole_weight == 0, tensor == 0) or precision == "bf16"


def test_sparse_layers_train_like_masked_dense_ones_in_every_layout():
    run_distributed(check_layouts_against_masked_dense, 2)

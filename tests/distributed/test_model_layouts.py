"""The decoder gives the single process' weights, loss and gradients however it is laid over ranks."""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import BlockSparseAttention, ModelConfig
from sparsetrain.models import Transformer, initialize_
from sparsetrain.sharding import weight_modules
from sparsetrain.testing import assert_close, run_distributed

VOCAB, SEQ_LEN, BATCH = 128, 40, 4
SPARSE = BlockSparseAttention(
    kind="block_sparse",
    block=16,
    heads=[{"kind": "union", "of": [{"kind": "local", "width": 1}, {"kind": "strided", "stride": 2}]}],
    layers=[1],
    within_documents=True,
)
CONFIGS = [
    ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, init_std=0.2),
    ModelConfig(arch="gpt2", dim=32, num_layers=2, num_heads=4, init_std=0.2),
    ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, init_std=0.2, attention=SPARSE),
]


def build(config):
    with torch.device("meta"):
        return Transformer(config, VOCAB, SEQ_LEN)


def materialize(model, config):
    model.to_empty(device="cpu")
    initialize_(model, config, seed=3)
    return model


def replicated(config):
    return DistributedDataParallel(materialize(build(config), config))


def fully_sharded(config, checkpointed=False):
    model = build(config)
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer) if checkpointed else layer
        fully_shard(model.layers[i])
    return materialize(fully_shard(model), config)


LAYOUTS = [replicated, fully_sharded, partial(fully_sharded, checkpointed=True)]


def samples():
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCAB, (2, BATCH, SEQ_LEN), generator=generator)
    document_ids = (torch.rand(BATCH, SEQ_LEN, generator=generator) < 0.1).cumsum(1)
    return tokens, targets, document_ids


def named(model):
    return [pair for _, _, parameters in weight_modules(model) for pair in parameters.items()]


def check_layouts_against_one_process():
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    whole = samples()
    part = [tensor[mine] for tensor in whole]
    for config in CONFIGS:
        oracle = materialize(build(config), config)
        expected = oracle(*whole)
        expected.backward()
        wanted = dict(oracle.named_parameters())
        for layout in LAYOUTS:
            model = layout(config)
            for name, parameter in named(model):
                assert_close(parameter, wanted[name], rtol=0.0, atol=0.0)
            loss = model(*part)
            (loss * size).backward()  # data parallelism averages over ranks; the sum is wanted
            dist.all_reduce(loss.detach_())
            assert_close(loss, expected)
            for name, parameter in named(model):
                assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-5)


def test_weights_loss_and_gradients_do_not_depend_on_the_layout():
    run_distributed(check_layouts_against_one_process, 2)

"""Megatron's models are ours: the same loss, logits and gradients as the plain model, at every layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.config import ParallelConfig, SparsityRule
from sparsetrain.config.model import ModelConfig
from sparsetrain.engines.optimizer import optimizer_groups
from sparsetrain.models import Transformer, initialize_
from sparsetrain.sharding import global_grad_norm, weight_shards
from sparsetrain.sparsity import Sparsifier
from sparsetrain.testing import assert_close, run_distributed
from sparsetrain.testing.megatron_cpu import megatron_on_cpu

pytest.importorskip("megatron.core")

VOCAB, SEQ_LEN, SAMPLES = 64, 32, 2
LLAMA: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 64}
GPT2: dict[str, Any] = {"arch": "gpt2", "dim": 32, "num_layers": 2, "num_heads": 4, "tie_embeddings": False}
LOCAL, DENSE = {"kind": "local", "width": 1}, {"kind": "dense"}
SPARSE = LLAMA | {
    "attention": {"kind": "block_sparse", "block": 16, "within_documents": True, "heads": [LOCAL, LOCAL, DENSE, LOCAL]}
}
MOE = LLAMA | {"num_kv_heads": 2, "moe": {"num_experts": 4, "top_k": 2, "shared_experts": 1, "layers": [1]}}

RULES = (
    SparsityRule(params="*.ffn.*", method="static", pattern="block[8,8]", sparsity=0.5),
    SparsityRule(params="*.attention.*", method="static", pattern="vector[8] 1:4"),
)

Layout = dict[str, int]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of which some do not count, and the documents that they belong to."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (SAMPLES, SEQ_LEN + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, ::7] = -100
    documents = (torch.arange(SEQ_LEN) >= 13).long().expand(SAMPLES, -1).contiguous()
    return tokens[:, :-1].contiguous(), targets, documents


@dataclass
class Expected:
    """What the plain model comes to, on this process alone; by name of the weight."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]


def plain(config: ModelConfig, rules: Sequence[SparsityRule]) -> Expected:
    """Run the plain model, masked by rules."""
    model = Transformer(config, VOCAB, SEQ_LEN)
    initialize_(model, config, seed=3)
    sparsifier = Sparsifier(rules, total_steps=1).attach(model, None)
    tokens, targets, documents = batch()
    loss = model(tokens, targets, documents)
    loss.backward()
    sparsifier.mask_gradients()
    logits = model(tokens, document_ids_BT=documents).detach()
    shards = weight_shards(model)
    grads = {shard.name: grad for shard in shards if (grad := shard.local_grad()) is not None}
    assert len(grads) == len(shards)
    weights = {shard.name: shard.local_weight() for shard in shards}
    return Expected(loss.detach(), logits, grads, weights, sparsifier.masks())


def run_stage(model: Any, *, with_targets: bool) -> Tensor | None:
    """Forward (and with targets backward) by Megatron's own schedule; the last stage's loss or logits."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens, targets, documents = batch()
    outputs: list[Tensor] = []

    def forward_step(_: Any, gpt: Any) -> tuple[Tensor, Any]:
        y = model(tokens, targets if with_targets else None, documents)

        def keep(y: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            outputs.append(y.detach())
            return y.sum(), torch.ones((), dtype=torch.int), {}

        return y, keep

    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=None, model=model.gpt, num_microbatches=1, seq_length=SEQ_LEN,
        micro_batch_size=SAMPLES, forward_only=not with_targets,
    )  # fmt: skip
    return outputs[0] if outputs else None


def compare(
    config: ModelConfig,
    layout: Layout,
    *,
    sequence_parallel: bool = False,
    recompute: bool = False,
    rules: Sequence[SparsityRule] = (),
) -> None:
    """Build the model at a layout and check it against the plain one."""
    from megatron.core import mpu, tensor_parallel

    from sparsetrain.engines.megatron_model import MegatronModel, Shape

    tp, pp, cp, ep = (layout.get(key, 1) for key in ("tp", "pp", "cp", "ep"))
    mpu.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        with torch.device("meta"):
            model = MegatronModel(Shape(config, VOCAB, SEQ_LEN, sequence_parallel, recompute))
        if ep > 1:
            model.spread_experts(ParallelConfig(experts="ep", ep=ep), timedelta(seconds=60))
        model.to_empty(device="cpu")
        initialize_(model, config, seed=3)
        expected = plain(config, rules)
        sparsifier = Sparsifier(rules, total_steps=1).attach(model, None)
        check_weights(model, expected, sparsifier.masks())
        loss = run_stage(model, with_targets=True)
        add_up_gradients(model, spread_over=tp * cp)
        sparsifier.mask_gradients()
        for shard in weight_shards(model):
            if shard.local_numel:
                grad, whole = shard.local_grad(), expected.grads[shard.name]
                assert grad is not None, shard.name
                assert_close(grad, shard.cut(whole), atol=1e-7 + 1e-5 * float(whole.abs().max()))
        logits = run_stage(model, with_targets=False)
        if loss is not None:
            assert logits is not None
            dist.all_reduce(loss, group=mpu.get_context_parallel_group())
            assert_close(loss, expected.loss)
            here = slice(SEQ_LEN // cp * mpu.get_context_parallel_rank(), None)
            assert_close(logits, expected.logits[:, here][:, : SEQ_LEN // cp])
    finally:
        mpu.destroy_model_parallel()


def check_weights(model: Any, expected: Expected, masks: dict[str, Tensor]) -> None:
    """Each rank's part is that part of the plain model's, bitwise; all parts together are the whole; masks, too."""
    from sparsetrain.models import SparseLinear

    shards = weight_shards(model)
    assert [shard.name for shard in shards] == list(expected.weights)
    for shard in shards:
        whole = expected.weights[shard.name]
        assert shard.global_shape == tuple(whole.shape)
        assert torch.equal(shard.local_weight(), shard.cut(whole)), shard.name
        if shard.name in masks:
            assert torch.equal(masks[shard.name], shard.cut(expected.masks[shard.name])), shard.name
        held = torch.tensor(float(shard.local_numel))
        if shard.group is not None:
            dist.all_reduce(held, group=shard.group)
        assert held == whole.numel(), shard.name
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert all((linear.pattern is not None) == bool(masks) for linear in linears)


def add_up_gradients(model: Any, spread_over: int) -> None:
    """What an engine does after the backward pass; every rank has had the same samples."""
    from megatron.core import mpu

    from sparsetrain.parallel.fssdp.store import store_parameters

    for _, parameter in model.replicated_parameters():
        dist.all_reduce(parameter.grad, group=mpu.get_tensor_model_parallel_group())
    spread = list(store_parameters(model).values())
    for parameter in model.parameters():
        assert parameter.grad is not None
        if any(parameter is store for store in spread):
            parameter.grad *= spread_over  # an average over ranks that each have a part of the tokens
        else:
            dist.all_reduce(parameter.grad, group=mpu.get_context_parallel_group())


def every_layout(world: int) -> None:
    """What is asked on so many ranks."""
    llama, gpt2, sparse, moe = (ModelConfig(**shape) for shape in (LLAMA, GPT2, SPARSE, MOE))
    with megatron_on_cpu():
        if world == 1:
            compare(llama, {})
            compare(gpt2.model_copy(update={"tie_embeddings": True}), {}, recompute=True)
            compare(moe, {})
            compare(llama, {}, rules=RULES)
        if world == 2:
            compare(llama, {"tp": 2})
            compare(gpt2, {"tp": 2}, sequence_parallel=True)
            compare(llama, {"pp": 2}, recompute=True)
            compare(llama, {"tp": 2}, rules=RULES)
            update_rows({})
            update_rows({"cp": 2})
            compare(sparse, {"cp": 2})
            compare(moe, {"ep": 2}, recompute=True)
            compare(moe, {"tp": 2, "ep": 2}, sequence_parallel=True)
        if world == 4:
            compare(sparse, {"tp": 2, "pp": 2}, sequence_parallel=True)
            compare(sparse, {"tp": 2, "cp": 2})
            compare(moe, {"tp": 2, "pp": 2, "ep": 2}, sequence_parallel=True)
            compare(moe, {"pp": 2, "ep": 2})
            compare(llama, {"tp": 2, "pp": 2}, sequence_parallel=True, rules=RULES)
            update_rows({"tp": 2}, sequence_parallel=True)
            update_rows({"pp": 2})


def update_rows(layout: Layout, *, sequence_parallel: bool = False) -> None:
    """Take a step in which each rank updates some rows of what others hold, too, and look at all of them."""
    from megatron.core import mpu, tensor_parallel

    from sparsetrain.engines.megatron_model import MegatronModel, Shape

    config = ModelConfig(**LLAMA)
    tp, pp, cp = (layout.get(key, 1) for key in ("tp", "pp", "cp"))
    mpu.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        with torch.device("meta"):
            model = MegatronModel(Shape(config, VOCAB, SEQ_LEN, sequence_parallel))
        model.to_empty(device="cpu")
        initialize_(model, config, seed=3)
        rows = model.share_rows(timedelta(seconds=60))
        expected = plain(config, ())
        check_weights(model, expected, {})
        run_stage(model, with_targets=True)
        add_up_gradients(model, spread_over=1)
        rows.take_gradients()
        shards = weight_shards(model)
        assert_close(global_grad_norm(shards), torch.stack([g.norm() for g in expected.grads.values()]).norm())
        held = sum(shard.local_numel for shard in shards)
        assert held <= sum(parameter.numel() for parameter in model.parameters()) // (dist.get_world_size() // tp // pp)
        groups = rows.groups(optimizer_groups(model))
        torch.optim.SGD([p for group in groups for p in group.parameters], lr=0.01).step()
        rows.gather()
        logits = run_stage(model, with_targets=False)
        if logits is not None:
            here = slice(SEQ_LEN // cp * mpu.get_context_parallel_rank(), None)
            assert_close(logits, updated_logits(config)[:, here][:, : SEQ_LEN // cp])
    finally:
        mpu.destroy_model_parallel()


def updated_logits(config: ModelConfig) -> Tensor:
    """Of the plain model after the same step."""
    model = Transformer(config, VOCAB, SEQ_LEN)
    initialize_(model, config, seed=3)
    tokens, targets, documents = batch()
    model(tokens, targets, documents).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    logits: Tensor = model(tokens, document_ids_BT=documents).detach()
    return logits


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_logits_and_gradients_are_those_of_the_plain_model(world: int) -> None:
    run_distributed(every_layout, world, world, timeout_s=280)

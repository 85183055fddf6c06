"""Megatron's models are ours: the same loss, logits and gradients as the plain model, at every layout."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.config import ParallelConfig
from sparsetrain.config.model import ModelConfig
from sparsetrain.models import Transformer, initialize_
from sparsetrain.sharding import weight_shards
from sparsetrain.testing import assert_close, run_distributed
from sparsetrain.testing.megatron_cpu import megatron_on_cpu

pytest.importorskip("megatron.core")

VOCAB, SEQ_LEN, SAMPLES = 64, 32, 2
LLAMA = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 48}
GPT2 = {"arch": "gpt2", "dim": 32, "num_layers": 2, "num_heads": 4, "tie_embeddings": False}
LOCAL, DENSE = {"kind": "local", "width": 1}, {"kind": "dense"}
SPARSE = LLAMA | {
    "attention": {"kind": "block_sparse", "block": 16, "within_documents": True, "heads": [LOCAL, LOCAL, DENSE, LOCAL]}
}
MOE = LLAMA | {"num_kv_heads": 2, "moe": {"num_experts": 4, "top_k": 2, "shared_experts": 1, "layers": [1]}}

Layout = dict[str, int]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of which some do not count, and the documents that they belong to."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (SAMPLES, SEQ_LEN + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, ::7] = -100
    documents = (torch.arange(SEQ_LEN) >= 13).long().expand(SAMPLES, -1).contiguous()
    return tokens[:, :-1].contiguous(), targets, documents


def plain(config: ModelConfig) -> tuple[dict[str, Tensor], float, Tensor]:
    """Gradients by name, loss and logits of the plain model, on this process alone."""
    model = Transformer(config, VOCAB, SEQ_LEN)
    initialize_(model, config, seed=3)
    tokens, targets, documents = batch()
    loss = model(tokens, targets, documents)
    loss.backward()
    logits = model(tokens, document_ids_BT=documents).detach()
    grads = {shard.name: shard.local_grad() for shard in weight_shards(model)}
    assert all(grad is not None for grad in grads.values())
    return grads, loss.item(), logits  # type: ignore[return-value]


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


def compare(config: ModelConfig, layout: Layout, *, sequence_parallel: bool = False, recompute: bool = False) -> None:
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
        expected_grads, expected_loss, expected_logits = plain(config)
        loss = run_stage(model, with_targets=True)
        check_gradients(model, expected_grads, spread_over=tp * cp)
        logits = run_stage(model, with_targets=False)
        if loss is not None:
            assert logits is not None
            dist.all_reduce(loss, group=mpu.get_context_parallel_group())
            assert_close(loss, torch.tensor(expected_loss))
            here = slice(SEQ_LEN // cp * mpu.get_context_parallel_rank(), None)
            assert_close(logits, expected_logits[:, here][:, : SEQ_LEN // cp])
    finally:
        mpu.destroy_model_parallel()


def check_gradients(model: Any, expected: dict[str, Tensor], spread_over: int) -> None:
    """Each rank's part is that part of the plain model's; all parts together are the whole."""
    from megatron.core import mpu

    from sparsetrain.parallel.fssdp.store import store_parameters

    shards = weight_shards(model)
    assert [shard.name for shard in shards] == list(expected)
    for _, parameter in model.replicated_parameters():
        dist.all_reduce(parameter.grad, group=mpu.get_tensor_model_parallel_group())
    spread = list(store_parameters(model).values())
    for parameter in model.parameters():
        assert parameter.grad is not None
        if any(parameter is store for store in spread):
            parameter.grad *= spread_over  # an average over ranks that each have a part of the tokens
        else:
            dist.all_reduce(parameter.grad, group=mpu.get_context_parallel_group())
    for shard in shards:
        whole = expected[shard.name]
        if shard.local_numel:
            grad = shard.local_grad()
            assert grad is not None, shard.name
            assert_close(grad, shard.cut(whole), atol=1e-7 + 1e-5 * float(whole.abs().max()))
        held = torch.tensor(float(shard.local_numel))
        if shard.group is not None:
            dist.all_reduce(held, group=shard.group)
        assert held == whole.numel(), shard.name


def every_layout(world: int) -> None:
    """What is asked on so many ranks."""
    llama, gpt2, sparse, moe = (ModelConfig(**shape) for shape in (LLAMA, GPT2, SPARSE, MOE))
    with megatron_on_cpu():
        if world == 1:
            compare(llama, {})
            compare(gpt2.model_copy(update={"tie_embeddings": True}), {}, recompute=True)
            compare(moe, {})
        if world == 2:
            compare(llama, {"tp": 2})
            compare(gpt2, {"tp": 2}, sequence_parallel=True)
            compare(llama, {"pp": 2}, recompute=True)
            compare(sparse, {"cp": 2})
            compare(moe, {"ep": 2}, recompute=True)
            compare(moe, {"tp": 2, "ep": 2}, sequence_parallel=True)
        if world == 4:
            compare(sparse, {"tp": 2, "pp": 2}, sequence_parallel=True)
            compare(sparse, {"tp": 2, "cp": 2})
            compare(moe, {"tp": 2, "pp": 2, "ep": 2}, sequence_parallel=True)
            compare(moe, {"pp": 2, "ep": 2})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_logits_and_gradients_are_those_of_the_plain_model(world: int) -> None:
    run_distributed(every_layout, world, world, timeout_s=200)

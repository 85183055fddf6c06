"""A whole training step of a small Mixtral (forward, backward, AdamW), over Hugging Face's implementation.

Both sides hold float32 weights, run bf16 under autocast, use torch's fused AdamW, leave out the balance loss, and see
random tokens; each has a process of its own. The peer is the fastest of Hugging Face's combinations of experts and
attention, found in the same run. batched_mm is left out: it copies the weights for every row, 13 GB of them a layer.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch

from bench.cases.train_step import BATCH, SEQ_LEN, VOCAB, fastest, random_tokens
from bench.registry import AtLeast, Bench, Row, Unavailable, case
from bench.workers import Step, Worker
from sparsetrain.config.model import ModelConfig
from sparsetrain.config.moe import MoeConfig
from sparsetrain.config.run import OptimizerConfig

CONFIG = ModelConfig(
    dim=256, num_layers=4, num_heads=4, ffn_dim=512, moe=MoeConfig(num_experts=8, top_k=2, ffn_dim=512, aux_loss=0.0)
)
TARGETS = {"fp32": AtLeast(1.3), "bf16": AtLeast(2.5)}


@case("moe_train_step", "training step, Mixtral shape (4 layers, d 256, 8 experts of 512, top-2, 16x256 tokens)")
def moe_train_step(bench: Bench) -> Iterator[Row]:
    try:
        import transformers
    except ImportError as missing:
        raise Unavailable("transformers is not installed; pip install 'sparsetrain[hf]'") from missing
    for precision, target in TARGETS.items():
        with ExitStack() as workers:

            def start(*args: Any, workers: ExitStack = workers) -> Worker:
                return workers.enter_context(Worker(*args, num_threads=bench.num_threads))

            ours = start(our_step, precision)
            ways = product(("grouped_mm", "eager"), ("sdpa", "eager"))
            peers = {f"{e} experts, {a} attention": start(peer_step, precision, e, a) for e, a in ways}
            name, peer = fastest(peers)
            label = f"transformers {transformers.__version__}, {name}"
            row = bench.compare(f"MoE training step {precision}", ours=ours, peer=peer, peer_name=label, target=target)
            yield _with_share_of_peak(row, precision)


def our_step(precision: str) -> Step:
    """Our decoder and optimizer, in a process set up as the training engine sets up its own."""
    from sparsetrain.engines.allocator import keep_freed_memory
    from sparsetrain.engines.optimizer import build_optimizer
    from sparsetrain.models import Transformer, initialize_

    keep_freed_memory()
    model = Transformer(CONFIG, VOCAB, SEQ_LEN)
    initialize_(model, CONFIG, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(), torch.device("cpu"))
    tokens = random_tokens("cpu")
    targets = tokens.roll(-1, dims=1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, targets) / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(precision: str, experts: str, attention: str) -> Step:
    """The same for Hugging Face's Mixtral."""
    from transformers import MixtralConfig, MixtralForCausalLM

    assert CONFIG.moe is not None
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.moe.ffn_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.kv_heads,
        num_local_experts=CONFIG.moe.num_experts,
        num_experts_per_tok=CONFIG.moe.top_k,
        max_position_embeddings=SEQ_LEN,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).train()
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    tokens = random_tokens("cpu")

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _with_share_of_peak(row: Row, precision: str) -> Row:
    from sparsetrain.models import Transformer
    from sparsetrain.planning.flops import ModelFlops
    from sparsetrain.planning.hardware import measured_matmul_peak

    with torch.device("meta"):
        model = Transformer(CONFIG, VOCAB, SEQ_LEN)
    num_tokens = BATCH * SEQ_LEN
    flops = ModelFlops.of(model, SEQ_LEN).train_per_token() * num_tokens
    peak = measured_matmul_peak(torch.device("cpu"), torch.bfloat16 if precision == "bf16" else torch.float32)
    ours, peer = median(row.ours), median(row.peer)
    note = f"{flops / ours / 1e9:.0f} GFLOP/s, {flops / ours / peak:.0%} of a measured matmul peak of {peak / 1e9:.0f}"
    note += f"; {num_tokens / ours:.0f} tokens/s; the peer {num_tokens / peer:.0f}, {flops / peer / peak:.0%}"
    return replace(row, note=note)

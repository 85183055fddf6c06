"""A whole training step of a small dense Llama (forward, backward, AdamW), over Hugging Face's implementation.

Both sides hold float32 weights, run bf16 under autocast, use torch's fused AdamW, and see random tokens; each has a
process of its own. The peer is the faster of Hugging Face's attention implementations, found in the same run.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

import torch

from bench.measure import seconds
from bench.registry import AtLeast, Bench, Row, Unavailable, case
from bench.workers import Step, Worker
from sparsetrain.config.model import ModelConfig
from sparsetrain.config.run import OptimizerConfig

CONFIG = ModelConfig(dim=256, num_layers=4, num_heads=4, ffn_dim=1024)
VOCAB, BATCH, SEQ_LEN = 4096, 16, 256
TARGET = {"fp32": AtLeast(1.05), "bf16": AtLeast(1.5)}


@case(
    "train_step",
    "training step, dense Llama shape (4 layers, d 256, ffn 1024, vocab 4096, 16x256 tokens)",
    devices=("cpu", "cuda"),
)
def train_step(bench: Bench) -> Iterator[Row]:
    try:
        import transformers
    except ImportError as missing:
        raise Unavailable("transformers is not installed; pip install 'sparsetrain[hf]'") from missing
    peer_name = f"transformers {transformers.__version__}"
    for precision, cpu_target in TARGET.items():
        target = cpu_target if bench.device == "cpu" else None
        with ExitStack() as workers:

            def start(*args: object, workers: ExitStack = workers) -> Worker:
                return workers.enter_context(Worker(*args, num_threads=bench.num_threads))  # type: ignore[arg-type]

            ours = start(our_step, bench.device, precision, False)
            peers = {name: start(peer_step, bench.device, precision, name, False) for name in ("sdpa", "eager")}
            attention, peer = fastest(peers)
            label = f"{peer_name}, {attention}"
            row = bench.compare(f"training step {precision}", ours=ours, peer=peer, peer_name=label, target=target)
            yield with_share_of_peak(row, bench.device, precision)
            if bench.quick:
                continue
            ours = start(our_step, bench.device, precision, True)
            name = f"training step {precision}, compiled"
            row = bench.compare(name, ours=ours, peer=peer, peer_name=label, target=target)
            yield with_share_of_peak(row, bench.device, precision)
            peer = start(peer_step, bench.device, precision, attention, True)
            yield bench.compare(f"{name}, both", ours=ours, peer=peer, peer_name=f"{label}, compiled")


def our_step(device: str, precision: str, compiled: bool) -> Step:
    """Our decoder and optimizer, in a process set up as the training engine sets up its own."""
    from sparsetrain.engines.allocator import keep_freed_memory
    from sparsetrain.engines.optimizer import build_optimizer
    from sparsetrain.models import Transformer, initialize_

    keep_freed_memory()
    model = Transformer(CONFIG, VOCAB, SEQ_LEN).to(device)
    initialize_(model, CONFIG, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(), torch.device(device))
    forward = torch.compile(model) if compiled else model
    tokens = random_tokens(device)
    targets = tokens.roll(-1, dims=1)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(tokens, targets) / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(device: str, precision: str, attention: str, compiled: bool) -> Step:
    """The same for Hugging Face's Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.hidden_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.kv_heads,
        max_position_embeddings=SEQ_LEN,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    model.set_attn_implementation(attention)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = random_tokens(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_tokens(device: str) -> torch.Tensor:
    """The batch that both sides train on."""
    return torch.randint(VOCAB, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0)).to(device)


def fastest(workers: dict[str, Worker]) -> tuple[str, Worker]:
    """The one with the shortest of a few steps, after one to warm up."""
    times = {name: [seconds(worker) for _ in range(4)][1:] for name, worker in workers.items()}
    name = min(times, key=lambda name: min(times[name]))
    return name, workers[name]


def with_share_of_peak(row: Row, device: str, precision: str) -> Row:
    """The row with a note on how much of the machine's matmul peak the step reaches."""
    from sparsetrain.models import Transformer
    from sparsetrain.planning.flops import ModelFlops
    from sparsetrain.planning.hardware import measured_matmul_peak

    with torch.device("meta"):
        model = Transformer(CONFIG, VOCAB, SEQ_LEN)
    flops = ModelFlops.of(model, SEQ_LEN).train_per_token() * BATCH * SEQ_LEN
    peak = measured_matmul_peak(torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)
    reached = flops / median(row.ours)
    note = f"{reached / 1e9:.0f} GFLOP/s, {reached / peak:.0%} of a measured matmul peak of {peak / 1e9:.0f}"
    return replace(row, note=f"{note}; {BATCH * SEQ_LEN / median(row.ours):.0f} tokens/s")

"""A whole training step of a model that is mostly feed-forward, 75 % of it zero, over the same model dense.

The model and the step of configs/sparse_ffn.yaml: our decoder with fused AdamW on random tokens, two micro-batches a
step. Each side has a process of its own; attention, embedding, loss and optimizer are in the figure, and do not become
faster. Masks stay where they are, as between two prunings. The first steps of a process are not measured: until the C
library holds all the memory that a step needs, the kernel maps and zeroes pages during it.
"""

from collections.abc import Iterator

import torch

from bench.measure import interleave
from bench.registry import AtLeast, Bench, Row, case
from bench.workers import Step, Worker
from sparsetrain.config.model import ModelConfig
from sparsetrain.config.run import OptimizerConfig
from sparsetrain.config.sparsity import SparsityRule

CONFIG = ModelConfig(dim=512, num_layers=4, num_heads=8, ffn_dim=4096)
VOCAB, MICRO_BATCHES, MICRO_BATCH, SEQ_LEN = 2048, 2, 8, 256
PATTERNS = ("block[64,64]", "vector[256] 1:4", "vector 1:4")
_PAIRS, _WARMUP = 7, 5
_TARGET = AtLeast(1.5)


@case("sparse_train_step", "training step, 75 % of the FFN zero (4 layers, d 512, FFN 4096, 2 x 8 x 256 tokens)")
def sparse_train_step(bench: Bench) -> Iterator[Row]:
    pairs = min(_PAIRS, bench.pairs)
    for precision in ("fp32", "bf16"):
        with Worker(step, precision, None, num_threads=bench.num_threads) as dense:
            for pattern in PATTERNS:
                with Worker(step, precision, pattern, num_threads=bench.num_threads) as ours:
                    samples = interleave(ours, dense, pairs=pairs, warmup=_WARMUP)
                yield Row(f"step {pattern} {precision}", *samples, "dense", _TARGET)


def step(precision: str, pattern: str | None) -> Step:
    """Forward, backward and AdamW, set up as the training engine does; pattern None: dense."""
    from sparsetrain.engines.allocator import keep_freed_memory
    from sparsetrain.engines.optimizer import build_optimizer
    from sparsetrain.models import Transformer, initialize_, use_sparse_linears
    from sparsetrain.sparsity import Sparsifier

    keep_freed_memory()
    model = Transformer(CONFIG, VOCAB, SEQ_LEN)
    initialize_(model, CONFIG, seed=0)
    use_sparse_linears(model)
    optimizer = build_optimizer(model, OptimizerConfig(), torch.device("cpu"))
    if pattern is not None:
        rule = SparsityRule(params="*.ffn.*", method="static", pattern=pattern, sparsity=0.75)
        Sparsifier([rule]).attach(model, optimizer)
    shape = MICRO_BATCHES, MICRO_BATCH, SEQ_LEN
    tokens = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, dims=-1)

    def run() -> None:
        for inputs, expected in zip(tokens, targets, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(inputs, expected) / targets.numel()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run

"""What the scheduler and the masks add to a training step at 75 % sparsity, with a mask update every 100 steps.

Masks on dense kernels save no time; the question here is how little they cost.
"""

from collections.abc import Iterator
from statistics import median

import torch
from torch.optim import Optimizer

from bench.measure import seconds
from bench.registry import AtMost, Bench, Row, case
from sparsetrain.config import ModelConfig, OptimizerConfig, SparsityRule
from sparsetrain.engines.optimizer import build_optimizer
from sparsetrain.models import Transformer, initialize_
from sparsetrain.sparsity import Sparsifier

_VOCAB, _SAMPLES, _SEQ_LEN = 4096, 16, 256
_MODEL = ModelConfig(arch="llama", dim=256, num_layers=4, num_heads=4, ffn_dim=1024)
_UPDATE_EVERY = 100


@case("sparsity_overhead", "scheduler and masks at 75 % in the training step of a small dense Llama")
def sparsity_overhead(bench: Bench) -> Iterator[Row]:
    for precision in (torch.float32, torch.bfloat16):
        dense, sparse, updating = (_Step(precision, every) for every in (None, _UPDATE_EVERY, 1))
        name = str(precision).removeprefix("torch.")
        for _ in range(2):  # warm up
            dense.run()
            sparse.run()
        overhead, step, update = [], [], []
        for _ in range(bench.pairs):
            step.append(seconds(dense.run))
            sparse.forward_backward()
            update.append(seconds(updating.after_step))
            each = seconds(sparse.mask_gradients) + seconds(sparse.after_step)
            overhead.append(each + update[-1] / _UPDATE_EVERY)
        note = f"{updating.numel / 1e6:.2f}M weights; a mask update takes {median(update) * 1e3:.3g} ms"
        yield Row(f"masking per step, {name}", overhead, step, "whole dense step", AtMost(0.02), note=note)
        yield bench.compare(
            f"masked step, {name}", ours=sparse.run, peer=dense.run, peer_name="dense step", target=AtMost(1.02)
        )


class _Step:
    """A model and its training step; sparse when masks are updated every so many steps, from the first step on."""

    def __init__(self, precision: torch.dtype, update_every: int | None) -> None:
        self.precision = precision
        self.model = Transformer(_MODEL, _VOCAB, _SEQ_LEN)
        initialize_(self.model, _MODEL, seed=0)
        self.optimizer: Optimizer = build_optimizer(self.model, OptimizerConfig(), torch.device("cpu"))
        self.tokens = torch.randint(_VOCAB, (_SAMPLES, _SEQ_LEN), generator=torch.Generator().manual_seed(0))
        rules = [_always_at_75(update_every)] if update_every else []
        # No optimizer: the step below calls what the optimizer's hooks would, so that it can be timed by itself.
        self.sparsifier = Sparsifier(rules, total_steps=100_000).attach(self.model, None)
        self.numel = self.sparsifier.numel

    def run(self) -> None:
        self.forward_backward()
        self.mask_gradients()
        self.optimizer.step()
        self.after_step()

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            loss = self.model(self.tokens, self.tokens)
        (loss / self.tokens.numel()).backward()

    def mask_gradients(self) -> None:
        self.sparsifier.mask_gradients()

    def after_step(self) -> None:
        self.sparsifier.after_step()


def _always_at_75(update_every: int) -> SparsityRule:
    schedule = {"kind": "cubic", "start": 0.0, "end": 1.0, "initial": 0.75, "every_steps": update_every}
    return SparsityRule(params=("*",), method="prune", sparsity=0.75, schedule=schedule)

"""One MoE layer, forward and backward, on two ranks: FSSDP over expert parallelism, under loads that do not move.

Both layers live in the same two processes of one thread each and take turns. Before they are timed, both go through
the steps in which they measure and plan: chunks of the exchange, replicas, and for FSSDP new owners.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.loads import save_steady_load
from bench.measure import interleave_ranks
from bench.registry import AtLeast, Bench, Row, case

NUM_RANKS, NUM_EXPERTS, TOP_K, DIM, FFN_DIM, TOKENS = 2, 8, 2, 512, 2048, 2048
PLANNING_STEPS, RESHARD_EVERY = 14, 6
TARGETS = {"L0": 0.95, "L4": 1.25, "L6": 1.6}


@case("fssdp_layer", f"MoE layer f+b on {NUM_RANKS} ranks of one thread: FSSDP over expert parallelism")
def fssdp_layer(bench: Bench) -> Iterator[Row]:
    from sparsetrain.testing import run_distributed

    for name, target in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "load.npz")
            save_steady_load(
                trace, name, num_ranks=NUM_RANKS, num_experts=NUM_EXPERTS, top_k=TOP_K, tokens_per_rank=TOKENS
            )
            measured = run_distributed(_measure, NUM_RANKS, str(trace), bench.pairs, timeout_s=1200)[0]
        balance = f"fullest rank {measured['ep_load']:.2f} of the mean with ep, {measured['fssdp_load']:.2f} with fssdp"
        yield Row(
            f"MoE layer {name}, {NUM_RANKS} ranks",
            measured["fssdp"],
            measured["ep"],
            "expert parallelism",
            AtLeast(target),
            note=f"E{NUM_EXPERTS} k{TOP_K} d{DIM} f{FFN_DIM}, {TOKENS} tokens a rank, fp32; {balance}",
        )


def _measure(trace: str, pairs: int) -> dict[str, Any]:
    fssdp, ep = _Layer("fssdp", trace), _Layer("ep", trace)
    for _ in range(PLANNING_STEPS):
        for layer in (fssdp, ep):
            layer.step()
            layer.plan()
    samples = interleave_ranks(fssdp.step, ep.step, pairs=pairs, warmup=0)
    return dict(zip(("fssdp", "ep"), samples, strict=True)) | {"fssdp_load": fssdp.load, "ep_load": ep.load}


class _Layer:
    """A layer spread over the ranks, whose router gives experts a recorded load."""

    def __init__(self, kind: str, trace: str) -> None:
        from sparsetrain.config.experts import FssdpConfig
        from sparsetrain.config.moe import Replay
        from sparsetrain.moe import MoELayer
        from sparsetrain.parallel import MoEController, parallelize

        torch.manual_seed(0)
        layer = MoELayer(DIM, FFN_DIM, NUM_EXPERTS, TOP_K, router=Replay(kind="replay", trace=trace))
        layer.router.source = dist.get_rank()
        self._layer = parallelize(
            layer, experts=kind, shard=None, options=FssdpConfig(reshard_every_steps=RESHARD_EVERY)
        )
        self._controller = MoEController(self._layer)
        self._x = torch.randn(TOKENS, DIM, requires_grad=True)
        self._dy = torch.randn(TOKENS, DIM)

    def step(self) -> None:
        """A forward and a backward pass."""
        self._layer.zero_grad()
        self._x.grad = None
        self._layer(self._x).backward(self._dy)

    def plan(self) -> None:
        """What follows a step."""
        self._controller.after_step()

    @property
    def load(self) -> float:
        """Rows of the fullest rank over the mean, in the latest pass."""
        from sparsetrain.parallel.fssdp.controller import runtimes_of

        load_D = runtimes_of(self._layer)[0].last_plans[0].load_D
        return float(load_D.max() / np.mean(load_D))

"""A step of our MoE layer under DeepSpeed over one of DeepSpeed's own layer, on two ranks, at the same forced routes.

Both compute a projection and an MoE layer of the same sizes, drop no token, and run through the same library: its
engine reduces the projection's gradient, and torch's fused AdamW updates all weights. Ours spreads experts by FSSDP.
DeepSpeed pads every expert of every rank to the fullest one; the note says how many rows each really computes.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.loads import save_steady_load
from bench.measure import interleave_ranks
from bench.registry import AtLeast, Bench, Row, Unavailable, case

NUM_RANKS, NUM_EXPERTS, TOP_K, DIM, FFN_DIM, TOKENS = 2, 8, 2, 512, 1024, 1024
PLANNING_STEPS, RESHARD_EVERY = 6, 2
TARGETS = {"L0": 1.2, "L6": 1.8}


@case("deepspeed_moe", f"MoE step under DeepSpeed on {NUM_RANKS} ranks of one thread: our layer over DeepSpeed's")
def deepspeed_moe(bench: Bench) -> Iterator[Row]:
    if importlib.util.find_spec("deepspeed") is None:
        raise Unavailable("DeepSpeed is not installed")
    from sparsetrain.testing import run_distributed

    for name, target in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "load.npz")
            save_steady_load(
                trace, name, num_ranks=NUM_RANKS, num_experts=NUM_EXPERTS, top_k=TOP_K, tokens_per_rank=TOKENS
            )
            ranks = run_distributed(_measure, NUM_RANKS, str(trace), bench.pairs, timeout_s=240)
        rows = {kind: max(rank[f"{kind}_rows"] for rank in ranks) for kind in ("ours", "theirs")}
        yield Row(
            f"MoE step {name}, {NUM_RANKS} ranks",
            ranks[0]["ours"],
            ranks[0]["theirs"],
            "DeepSpeed's MoE, drop_tokens=False",
            AtLeast(target),
            note=f"E{NUM_EXPERTS} k{TOP_K} d{DIM} f{FFN_DIM} gelu, {TOKENS} tokens a rank, fp32; rows of experts on "
            f"the fullest rank: {rows['ours']} ours, {rows['theirs']} theirs",
        )


def _measure(trace: str, pairs: int) -> dict[str, Any]:
    x_TD, dy_TD = torch.randn(TOKENS, DIM), torch.randn(TOKENS, DIM)
    ours, theirs = _Ours(trace), _Theirs(trace)
    for _ in range(PLANNING_STEPS):
        ours.step(x_TD, dy_TD)
    samples = interleave_ranks(lambda: ours.step(x_TD, dy_TD), lambda: theirs.step(x_TD, dy_TD), pairs=pairs)
    return dict(zip(("ours", "theirs"), samples, strict=True)) | {"ours_rows": ours.rows, "theirs_rows": theirs.rows}


def _replayed(trace: str) -> Any:
    """Our router that deals out a recorded load: that of this rank."""
    from sparsetrain.config.moe import Replay
    from sparsetrain.moe import MoELayer

    torch.manual_seed(0)
    layer = MoELayer(DIM, FFN_DIM, NUM_EXPERTS, TOP_K, activation="gelu", router=Replay(kind="replay", trace=trace))
    layer.router.source = dist.get_rank()
    return layer


class _Ours:
    """Our layer: FSSDP beside ZeRO."""

    def __init__(self, trace: str) -> None:
        from sparsetrain.config.experts import FssdpConfig
        from sparsetrain.engines.deepspeed_engine import import_deepspeed
        from sparsetrain.engines.shown_model import ShownModel
        from sparsetrain.parallel import MoEController, parallelize, store_parameters

        layer = parallelize(
            _replayed(trace), experts="fssdp", shard=None, options=FssdpConfig(reshard_every_steps=RESHARD_EVERY)
        )
        model = nn.Sequential(nn.Linear(DIM, DIM, bias=False), layer)
        experts = list(store_parameters(model).values())
        shown = ShownModel(model, experts, torch.autocast("cpu", enabled=False))
        others = torch.optim.AdamW(shown.parameters(), fused=True)
        deepspeed = import_deepspeed(torch.device("cpu"))
        self._engine, *_ = deepspeed.initialize(
            model=shown, optimizer=others, config=_config(), dist_init_required=False
        )
        self._optimizer = torch.optim.AdamW(experts, fused=True)
        self._controller = MoEController(model, self._optimizer)
        self._layer = layer

    def step(self, x_TD: Tensor, dy_TD: Tensor) -> None:
        self._engine.backward((self._engine(x_TD) * dy_TD).mean())
        self._engine.step()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def rows(self) -> int:
        """Of this rank's experts, in the latest pass."""
        from sparsetrain.parallel.fssdp.controller import runtimes_of

        return int(runtimes_of(self._layer)[0].last_plans[0].load_D.max())


class _Theirs:
    """DeepSpeed's layer with expert parallelism."""

    def __init__(self, trace: str) -> None:
        from sparsetrain.engines.deepspeed_engine import import_deepspeed

        deepspeed = import_deepspeed(torch.device("cpu"))
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(DIM, FFN_DIM), nn.GELU(approximate="tanh"), nn.Linear(FFN_DIM, DIM))
        self._moe = MoE(
            DIM, expert, NUM_EXPERTS, ep_size=NUM_RANKS, k=TOP_K, drop_tokens=False, top2_2nd_expert_sampling=False
        )
        self._moe.deepspeed_moe.gate.forward = self._gate
        self._logits_TE = _forced_logits(trace)
        model = _First(nn.Linear(DIM, DIM, bias=False), self._moe)
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        optimizer = torch.optim.AdamW(groups, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_config(), dist_init_required=False
        )

    def step(self, x_TD: Tensor, dy_TD: Tensor) -> None:
        self._engine.backward((self._engine(x_TD) * dy_TD).mean())
        self._engine.step()

    def _gate(self, x_TD: Tensor, used: Any = None, sparse_routes: bool = False, use_tutel: bool = False) -> Any:
        """DeepSpeed's own gating, on given logits in place of a product with its weight."""
        from deepspeed.moe.sharded_moe import top2gating

        gate = self._moe.deepspeed_moe.gate
        x_TD.float() @ gate.wg.weight.mT  # its router costs what it does
        routes = top2gating(self._logits_TE.clone(), 1.0, 4, False, gate.ep_group, False, sparse_routes)
        self._capacity = int(routes[1])
        return routes

    @property
    def rows(self) -> int:
        """Of this rank's experts, padding included."""
        return self._capacity * NUM_EXPERTS


class _First(nn.Module):
    """A projection, and of an MoE layer its first result."""

    def __init__(self, projection: nn.Module, moe: nn.Module) -> None:
        super().__init__()
        self.projection, self.moe = projection, moe

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.moe(self.projection(x_TD))[0]
        return y_TD


def _forced_logits(trace: str) -> Tensor:
    """Logits by which a top-2 router sends tokens where the replayed one does."""
    expert_TK = _replayed(trace).router._deal(TOKENS)
    logits_TE = torch.full((TOKENS, NUM_EXPERTS), -10.0)
    return logits_TE.scatter(1, expert_TK, torch.tensor([2.0, 1.0]).expand(TOKENS, TOP_K))


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }

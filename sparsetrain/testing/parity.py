"""Do all engines and layouts train alike? The same model on the same batches, and what differs after 20 steps.

    python -m sparsetrain.testing.parity          # prints the tables, on 2 and 4 gloo processes

The first layout is the reference. Losses and gradient norms are compared step by step, in fp32; masks by a number that
depends on every entry of every mask, also step by step, so masks that are equal everywhere are bitwise equal.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sparsetrain.config import RunConfig
from sparsetrain.data import Batch
from sparsetrain.engines import Engine
from sparsetrain.parallel import World, join_world
from sparsetrain.sharding import WeightShard
from sparsetrain.sparsity import Sparsifier
from sparsetrain.sparsity.keys import random_keys
from sparsetrain.testing.distributed import run_distributed
from sparsetrain.testing.megatron_cpu import megatron_on_cpu
from sparsetrain.training.setup import engine_of

STEPS = 20
_VOCABULARY, _SEQ_LEN, _SAMPLES, _MICRO_BATCH = 64, 48, 8, 2
_SEED = 1
"""With 0 rounding may decide on a mask: at step 3 the last weight that is pruned is 0.0168064460 and the first one that
is kept 0.0168066528, which is 2e-7 apart, and by then weights differ by up to 5e-6 from engine to engine."""
_CLIP = 0.5
"""Below the gradient's norm, so that clipping does something in every step."""

_ZERO = {f"deepspeed, ZeRO-{stage}": {"engine": "deepspeed", "zero": stage} for stage in range(4)}
_FSSDP = {"experts": "fssdp", "fssdp": {"reshard_every_steps": 5, "replan": "always"}}

KINDS = ("dense", "sparse", "moe", "recipe", "blocks")
"""Of models; see `model_config`."""

LAYOUTS: dict[str, dict[str, Any]] = {"torch, DDP": {}, "torch, fully_shard": {"shard": "full"}, **_ZERO}
"""What parallel says, by the name of the layout; the first is the reference."""
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = (
    LAYOUTS
    | {f"{name}, fssdp": parallel | _FSSDP for name, parallel in LAYOUTS.items()}
    | {"deepspeed, ZeRO-3, ep": _ZERO["deepspeed, ZeRO-3"] | {"experts": "ep"}}
)

_MEGATRON = {"engine": "megatron"}
MEGATRON_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "megatron, TP1": _MEGATRON,
        "megatron, TP1, ZeRO-1": _MEGATRON | {"zero": 1},
        "megatron, TP2": _MEGATRON | {"tp": 2},
        "megatron, PP2": _MEGATRON | {"pp": 2},
        "megatron, CP2": _MEGATRON | {"cp": 2},
    },
    4: {
        "megatron, TP2, ZeRO-1": _MEGATRON | {"tp": 2, "zero": 1},
        "megatron, TP2, PP2": _MEGATRON | {"tp": 2, "pp": 2},
        "megatron, TP2, sequence, PP2": _MEGATRON | {"tp": 2, "sp": True, "pp": 2},
        "megatron, PP2, CP2": _MEGATRON | {"pp": 2, "cp": 2},
    },
}
"""Those of Megatron by the number of ranks, which are data-parallel where there are more than the layout names."""
MEGATRON_EXPERT_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "megatron, EP2": _MEGATRON | {"experts": "ep"},
        "megatron, PP2": _MEGATRON | {"pp": 2},
        "megatron, fssdp": _MEGATRON | _FSSDP,
    },
    4: {
        "megatron, TP2, EP2": _MEGATRON | {"tp": 2, "sp": True, "experts": "ep", "ep": 2},
        "megatron, TP2, fssdp": _MEGATRON | {"tp": 2, "sp": True} | _FSSDP,
        "megatron, PP2, EP2": _MEGATRON | {"pp": 2, "experts": "ep", "ep": 2},
    },
}


@dataclass(frozen=True)
class Curve:
    """A short training, step by step; the same on all ranks."""

    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    """Before clipping."""
    masks: tuple[int, ...]
    """A number that every entry of every mask goes into; 0 where nothing is masked."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of a layout from the reference in any step."""

    loss: float
    grad_norm: float
    """Relative."""
    same_masks: bool

    @classmethod
    def between(cls, curve: Curve, reference: Curve) -> "Difference":
        """Compare two trainings of equally many steps."""
        norms = zip(curve.grad_norm, reference.grad_norm, strict=True)
        return cls(
            loss=max(abs(ours - theirs) for ours, theirs in zip(curve.loss, reference.loss, strict=True)),
            grad_norm=max(abs(ours - theirs) / theirs for ours, theirs in norms),
            same_masks=curve.masks == reference.masks,
        )


def model_config(kind: str) -> dict[str, Any]:
    """The model and the rules of a kind.

    dense: no rules. sparse: unstructured masks that move. moe: the same on experts. recipe: n:m seen by the forward
    pass, another in each half of a layer. blocks: block-sparse attention, and zeros in blocks that kernels can leave
    out.
    """
    model: dict[str, Any] = {"dim": 24, "num_layers": 2, "num_heads": 2, "ffn_dim": 40, "vocab_size": 257}
    if kind == "moe":
        model["moe"] = {"num_experts": 8, "top_k": 2, "ffn_dim": 16, "aux_loss": 0.01, "z_loss": 0.001}
    if kind == "blocks":
        model["ffn_dim"] = 48  # half of it is whole blocks, too
        model["attention"] = {"kind": "block_sparse", "block": 16, "heads": [{"kind": "local", "width": 2}]}
    prune = {
        "method": "prune",
        "distribution": "global",
        "sparsity": 0.75,
        "schedule": {"kind": "cubic", "every_steps": 2},
    }
    rules: dict[str, list[dict[str, Any]]] = {
        "dense": [],
        "sparse": [{"params": ["*.attention.*", "*.ffn.*"], **prune}],
        "moe": [{"params": "*.experts.*", **prune}],
        "recipe": [
            {"params": "*.ffn.*", "method": "sr_ste", "pattern": "2:4"},
            {"params": "*.attention.*", "method": "bdwp", "pattern": "2:4"},
        ],
        "blocks": [{"params": "*.ffn.*", "pattern": "block[8,8]", **prune}],
    }
    return {"model": model, "sparsity": rules[kind]}


def train_layouts(kind: str, layouts: Mapping[str, Mapping[str, Any]], steps: int = STEPS) -> dict[str, Curve]:
    """Train a kind of model once for each layout, on the ranks of the process group that is there."""
    return {name: train_layout(kind, parallel, steps) for name, parallel in layouts.items()}


def run_config(
    kind: str,
    parallel: Mapping[str, Any],
    steps: int = STEPS,
    overrides: Mapping[str, Any] | None = None,
    rules: Sequence[Mapping[str, Any]] | None = None,
) -> RunConfig:
    """The run of a kind of model in a layout, with `overrides` for DeepSpeed, and with `rules` instead of its own."""
    return RunConfig.model_validate(
        {
            "name": "parity",
            "seed": _SEED,
            "data": {"seq_len": _SEQ_LEN},
            "optimizer": {"lr": 1e-2, "grad_clip": _CLIP},
            "train": {"tokens": steps * _SAMPLES * _SEQ_LEN, "batch_tokens": _SAMPLES * _SEQ_LEN},
            "parallel": dict(parallel),
            "engine_overrides": {"deepspeed": dict(overrides or {})},
            **model_config(kind),
            **({} if rules is None else {"sparsity": rules}),
        }
    )


def build_engine(config: RunConfig, world: World) -> Engine:
    """The run's engine on a model of few tokens."""
    steps = config.train.tokens // config.train.batch_tokens
    return engine_of(config)(config, world, vocab_size=_VOCABULARY, max_seq_len=_SEQ_LEN, total_steps=steps)


def train_layout(
    kind: str,
    parallel: Mapping[str, Any],
    steps: int = STEPS,
    overrides: Mapping[str, Any] | None = None,
    rules: Sequence[Mapping[str, Any]] | None = None,
) -> Curve:
    """Train from the same weights on the same batches; arguments as for `run_config`; collective."""
    config = run_config(kind, parallel, steps, overrides, rules)
    on_this_machine = megatron_on_cpu() if config.parallel.engine == "megatron" else nullcontext()
    with on_this_machine, join_world(config) as world:
        engine = build_engine(config, world)
        sparsifier = Sparsifier(config.sparsity, total_steps=steps)
        sparsifier.attach(engine.module, engine.optimizer, shards=engine.weight_shards())
        losses, norms, masks = [], [], []
        for step in range(steps):
            losses.append(engine.forward_backward(micro_batches(step, world.share, world.num_shares)).item())
            sparsifier.mask_gradients()
            norms.append(engine.clip(_CLIP).item())
            engine.step(1e-2)
            masks.append(_number_of(sparsifier.masks(), engine.weight_shards()))
    return Curve(tuple(losses), tuple(norms), tuple(masks))


def micro_batches(step: int, rank: int, num_ranks: int) -> list[Batch]:
    """A rank's share of a step's samples."""
    generator = torch.Generator().manual_seed(step)
    # Squared: some tokens are frequent, so there is something to learn.
    samples_BS = (torch.rand(_SAMPLES, _SEQ_LEN + 1, generator=generator).square() * _VOCABULARY).long()
    share = _SAMPLES // num_ranks
    mine_BS = samples_BS[rank * share : (rank + 1) * share]
    return [
        Batch(part[:, :-1], part[:, 1:], torch.zeros_like(part[:, 1:], dtype=torch.int32), torch.arange(len(part)))
        for part in torch.split(mine_BS, _MICRO_BATCH)
    ]


def _number_of(masks: Mapping[str, torch.Tensor], shards: Sequence[WeightShard]) -> int:
    """Sum of a pseudo-random number of each zeroed weight, by its name and place in the whole; collective."""
    total = torch.zeros((), dtype=torch.int64)
    for shard in shards:
        if shard.name in masks:
            numbers = random_keys(0, shard.name, shard.global_indices())
            part = numbers.long().masked_fill(masks[shard.name], 0).sum()
            if shard.group is not None:
                dist.all_reduce(part, group=shard.group)
            total += part
    return int(total)


def compare(kind: str, world_size: int, layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, Difference]:
    """Train a kind of model in all layouts over new gloo processes, and compare each with the first."""
    curves = run_distributed(train_layouts, world_size, kind, layouts, timeout_s=300)[0]
    reference = next(iter(curves.values()))
    return {name: Difference.between(curve, reference) for name, curve in curves.items()}


def available_layouts(kind: str) -> dict[str, dict[str, Any]]:
    """The layouts of a kind of model whose libraries are installed."""
    layouts = EXPERT_LAYOUTS if kind == "moe" else LAYOUTS
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    return {name: parallel for name, parallel in layouts.items() if has_deepspeed or "engine" not in parallel}


def megatron_layouts(kind: str, world_size: int) -> dict[str, dict[str, Any]]:
    """The reference and the layouts of Megatron for a kind of model; the reference alone where it is not installed."""
    reference, parallel = next(iter(LAYOUTS.items()))
    if importlib.util.find_spec("megatron") is None:
        return {reference: parallel}
    layouts = MEGATRON_EXPERT_LAYOUTS if kind == "moe" else MEGATRON_LAYOUTS
    return {reference: parallel} | layouts.get(world_size, {})


def main(world_sizes: Sequence[int] = (2, 4)) -> None:
    """Print a table for each kind of model and number of ranks, as soon as it is there."""
    console = Console(width=100)
    for kind in KINDS:
        for world_size in world_sizes:
            table = Table(title=f"{kind}, {world_size} ranks: largest difference over {STEPS} steps, fp32")
            for column in ("engine and layout", "loss", "gradient norm, relative", "masks"):
                table.add_column(column)
            layouts = available_layouts(kind) | megatron_layouts(kind, world_size)
            for name, found in compare(kind, world_size, layouts).items():
                same = "bitwise equal" if found.same_masks else "DIFFERENT"
                table.add_row(name, f"{found.loss:.1e}", f"{found.grad_norm:.1e}", "-" if kind == "dense" else same)
            console.print(table)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or (2, 4))

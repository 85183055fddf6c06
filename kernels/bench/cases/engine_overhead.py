"""What our engines add to the bare library's own training loop, with the same model on two ranks.

Both loops live in the same two processes of one thread each and take turns: DDP with `clip_grad_norm_` and AdamW on one
side, `deepspeed.initialize` with its own clipping and step on the other. Ours computes the same update from the same
gradient; what it adds are the protocol, the true norm over shards, and the masks' hooks with nothing to mask.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.measure import interleave_ranks
from bench.registry import AtMost, Bench, Row, case

NUM_RANKS, VOCAB, SAMPLES, SEQ_LEN = 2, 2048, 4, 256
LAYOUTS = {"DDP": {}, "ZeRO-2": {"engine": "deepspeed", "zero": 2}, "ZeRO-3": {"engine": "deepspeed", "zero": 3}}

Step = Callable[[], object]


@case("engine_overhead", f"training step on {NUM_RANKS} ranks of one thread: our engines over the libraries' loops")
def engine_overhead(bench: Bench) -> Iterator[Row]:
    from sparsetrain.testing import run_distributed

    for name, parallel in LAYOUTS.items():
        if "engine" in parallel and importlib.util.find_spec("deepspeed") is None:
            continue
        ours_s, theirs_s = run_distributed(_measure, NUM_RANKS, parallel, bench.pairs, timeout_s=240)[0]
        yield Row(
            f"training step, {name}",
            ours_s,
            theirs_s,
            f"bare {'DeepSpeed' if 'engine' in parallel else 'torch'}",
            AtMost(1.02),
            note=f"Llama d256, 4 layers, {SAMPLES}x{SEQ_LEN} tokens a rank, fp32",
        )


def _measure(parallel: dict[str, Any], pairs: int) -> tuple[list[float], list[float]]:
    config = _config(parallel)
    return interleave_ranks(_ours(config), _theirs(config), pairs=pairs)


def _config(parallel: dict[str, Any]) -> Any:
    from sparsetrain.config import RunConfig

    return RunConfig(
        name="overhead",
        model={"dim": 256, "num_layers": 4, "num_heads": 4, "ffn_dim": 1024, "vocab_size": VOCAB},
        data={"seq_len": SEQ_LEN},
        train={"tokens": 10**6, "batch_tokens": NUM_RANKS * SAMPLES * SEQ_LEN, "micro_batch_size": SAMPLES},
        parallel=parallel,
    )


def _tokens() -> Tensor:
    return torch.randint(VOCAB, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(dist.get_rank()))


def _ours(config: Any) -> Step:
    from sparsetrain.data import Batch
    from sparsetrain.parallel import World
    from sparsetrain.training.setup import engine_of

    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    engine = engine_of(config)(config, world, vocab_size=VOCAB, max_seq_len=SEQ_LEN, total_steps=1000)
    tokens_BT = _tokens()
    batch = Batch(tokens_BT, tokens_BT, torch.zeros_like(tokens_BT, dtype=torch.int32), torch.arange(SAMPLES))

    def step() -> None:
        engine.forward_backward([batch])
        engine.clip(1.0)
        engine.step(1e-4)

    return step


def _theirs(config: Any) -> Step:
    from sparsetrain.engines.optimizer import build_optimizer
    from sparsetrain.models import Transformer, initialize_

    model = Transformer(config.model, VOCAB, SEQ_LEN)
    initialize_(model, config.model, seed=0)
    optimizer = build_optimizer(model, config.optimizer, torch.device("cpu"))
    tokens_BT = _tokens()
    if config.parallel.engine == "deepspeed":
        return _bare_deepspeed(model, optimizer, tokens_BT, config.parallel.zero_stage)
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> None:
        (ddp(tokens_BT, tokens_BT) / tokens_BT.numel()).backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bare_deepspeed(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BT: Tensor, stage: int) -> Step:
    from sparsetrain.engines.deepspeed_engine import import_deepspeed

    engine, *_ = import_deepspeed(torch.device("cpu")).initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": SAMPLES,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        },
        dist_init_required=False,
    )

    def step() -> None:
        engine.backward(engine(tokens_BT, tokens_BT) / tokens_BT.numel())
        engine.step()

    return step

"""Each engine trains 50 steps on one GPU with NCCL: tokens a second, and the model's FLOPs over the GPU's matmul peak.

Engines run one after the other, each in a process of its own, on the same model and batches. The peak is measured in
the same process, so the share does not depend on what a data sheet says.
"""

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.registry import Bench, Row, case

STEPS, WARM_UP = 50, 5
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "torch, DDP": ("torch", {}),
    "torch, fully_shard": ("torch", {"shard": "full"}),
    "DeepSpeed, ZeRO-1": ("deepspeed", {"engine": "deepspeed", "zero": 1}),
    "DeepSpeed, ZeRO-3": ("deepspeed", {"engine": "deepspeed", "zero": 3}),
    "Megatron-Core": ("megatron", {"engine": "megatron"}),
}
"""The module of each, and what `parallel` says."""
SHAPE = {"dim": 1024, "num_layers": 12, "num_heads": 16, "ffn_dim": 2816, "vocab_size": 32000}
SAMPLES, SEQ_LEN = 8, 2048


@case("engines_cuda", f"{STEPS} training steps of each engine on one GPU with NCCL, bf16", devices=("cuda",))
def engines_cuda(bench: Bench) -> Iterator[Row]:
    from sparsetrain.testing import run_distributed

    steps = 10 if bench.quick else STEPS
    for name, (module, parallel) in ENGINES.items():
        if importlib.util.find_spec(module) is None:
            continue
        rates, flops_per_token, peak = run_distributed(
            train_on_one_device, 1, parallel, SHAPE, SAMPLES, SEQ_LEN, steps, 1, backend="nccl", timeout_s=600
        )[0]
        row = Row(f"training, {name}", rates, unit="tokens/s")
        share = row.figure.median * flops_per_token / peak
        of_peak = f"MFU {100 * share:.1f} % of {peak / 1e12:.0f} TFLOP/s measured"
        note = f"{steps} steps of {SAMPLES}x{SEQ_LEN} tokens, {of_peak}"
        yield Row(row.name, rates, unit=row.unit, note=note, details={"mfu": share})


def train_on_one_device(
    parallel: dict[str, Any], shape: dict[str, Any], samples: int, seq_len: int, steps: int, gpus: int
) -> tuple[list[float], float, float]:
    """Train from scratch on random tokens, which are the same in every step, so the loss must fall.

    Returns:
        Tokens a second of each step after warming up, FLOPs of a token, and the device's bf16 matmul peak in FLOP/s.
    """
    from sparsetrain.config import RunConfig
    from sparsetrain.data import Batch
    from sparsetrain.parallel import join_world
    from sparsetrain.planning.flops import ModelFlops
    from sparsetrain.planning.hardware import measured_matmul_peak
    from sparsetrain.training.setup import engine_of

    num_tokens = samples * seq_len
    config = RunConfig(
        name="engines",
        model=shape,
        data={"seq_len": seq_len},
        train={
            "tokens": (steps + WARM_UP) * num_tokens,
            "batch_tokens": num_tokens,
            "micro_batch_size": samples,
            "precision": "bf16",
        },
        parallel=parallel,
        cluster={"gpus_per_worker": gpus},
    )
    rows = shape["vocab_size"]
    with join_world(config) as world:
        engine = engine_of(config)(config, world, vocab_size=rows, max_seq_len=seq_len, total_steps=steps + WARM_UP)
        tokens_BT = torch.randint(rows, (samples, seq_len + 1), generator=torch.Generator().manual_seed(0))
        document_ids_BT = torch.zeros(samples, seq_len, dtype=torch.int32)
        batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], document_ids_BT, torch.arange(samples)).to(world.device)
        flops = ModelFlops.of(engine.module, seq_len).train_per_token()
        losses, rates = [], []
        for step in range(steps + WARM_UP):
            began = time.perf_counter()
            losses.append(float(engine.forward_backward([batch])))  # waits for the device
            engine.clip(1.0)
            engine.step(1e-3)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if step >= WARM_UP:
                rates.append(num_tokens / (time.perf_counter() - began))
        assert losses[-1] < losses[0], losses
        return rates, flops, measured_matmul_peak(world.device, torch.bfloat16)

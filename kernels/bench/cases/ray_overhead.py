"""A training step under Ray over the same step under torchrun: what the controller, health checks and events cost.

A sample is the median step of a whole run, because the two kinds of run cannot share a process; the runs take turns, so
that a pair sees the same weather.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from bench.registry import AtMost, Bench, Row, Unavailable, case
from sparsetrain.training.metrics import read_metrics

CONFIG = Path(__file__).parents[3] / "configs" / "quick.yaml"
NUM_RANKS, BATCH_TOKENS = 2, 1024
WARMUP_STEPS = 20
SHAPE = (
    "model.dim=256 model.num_layers=4 model.num_heads=4 model.ffn_dim=704 data.seq_len=128 train.phases=[] sparsity=[]"
)


@case("ray_overhead", "median training step of 2 ranks under Ray over the same under torchrun, whole runs in turns")
def ray_overhead(bench: Bench) -> Iterator[Row]:
    if find_spec("ray") is None:
        raise Unavailable("ray is not installed")
    cpus = len(os.sched_getaffinity(0))
    if cpus < NUM_RANKS:
        raise Unavailable(f"{NUM_RANKS} ranks need as many CPUs, and this machine has {cpus}")
    pairs, steps = (2, 30) if bench.quick else (8, 80)
    ray_s, torchrun_s = [], []
    for pair in range(pairs):
        for kind in ("ray", "torchrun") if pair % 2 else ("torchrun", "ray"):
            (ray_s if kind == "ray" else torchrun_s).append(_median_step_s(kind, steps))
    yield Row(
        f"training step, {NUM_RANKS} ranks, gloo",
        ray_s,
        torchrun_s,
        "torchrun",
        AtMost(1.05),
        note=f"{pairs} pairs of runs, median of steps {WARMUP_STEPS + 1} to {steps} each",
    )


def _median_step_s(kind: str, steps: int) -> float:
    """Train in processes of their own and return the median step after the first ones, in seconds."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    with tempfile.TemporaryDirectory(prefix="ray-overhead-") as folder:
        overrides = [
            *SHAPE.split(),
            *(f"output={folder}/run", f"cluster.workers={NUM_RANKS}", f"train.batch_tokens={BATCH_TOKENS}"),
            *(f"train.tokens={steps * BATCH_TOKENS}", "train.eval_every_steps=100000", "train.eval_tokens=256"),
            "checkpoint.every_steps=100000",
        ]
        launcher, where = (torchrun, ["--in-process"]) if kind == "torchrun" else ([], ["--address", "local"])
        command = [sys.executable, *launcher, "-m", "sparsetrain", "train", *where, str(CONFIG), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return median(row["step_time_s"] for row in read_metrics(Path(folder, "run"))[WARMUP_STEPS:])

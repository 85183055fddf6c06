"""A training step under Ray over the same step under torchrun: what the controller, health checks and events cost.

Both runs are started, and from then on one of them is stopped (SIGSTOP, with all that belongs to it) while the other
trains for a few seconds: turns short enough that a pair sees the same weather, and neither pays for the other's
background work.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from bench.registry import AtMost, Bench, Row, Unavailable, case
from sparsetrain.training.metrics import read_metrics

CONFIG = Path(__file__).parents[3] / "configs" / "quick.yaml"
NUM_RANKS = 2
OVERRIDES = (
    *("model.dim=256", "model.num_layers=4", "model.num_heads=4", "model.ffn_dim=704", "data.seq_len=128"),
    *("train.batch_tokens=512", "train.tokens=1B", "train.phases=[]", "sparsity=[]", f"cluster.workers={NUM_RANKS}"),
    *("train.eval_every_steps=1000000", "train.eval_tokens=256", "checkpoint.every_steps=1000000"),
)
WARMUP_STEPS = 10
TURN_S = 4.0
START_TIMEOUT_S = 300.0


@case("ray_overhead", f"training step of {NUM_RANKS} ranks under Ray over the same under torchrun, in turns")
def ray_overhead(bench: Bench) -> Iterator[Row]:
    if find_spec("ray") is None:
        raise Unavailable("ray is not installed")
    cpus = len(os.sched_getaffinity(0))
    if cpus < NUM_RANKS:
        raise Unavailable(f"{NUM_RANKS} ranks need as many CPUs, and this machine has {cpus}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    with _Run([], "--address=local") as under_ray, _Run(torchrun, "--in-process") as under_torchrun:
        samples: dict[_Run, list[float]] = {under_ray: [], under_torchrun: []}
        for pair in range(bench.pairs):
            for run in (under_ray, under_torchrun) if pair % 2 else (under_torchrun, under_ray):
                samples[run].append(run.turn())
    yield Row(
        f"training step, {NUM_RANKS} ranks, gloo",
        samples[under_ray],
        samples[under_torchrun],
        "torchrun",
        AtMost(1.05),
        note=f"{bench.pairs} pairs of turns of {TURN_S:g} s, median step of each",
    )


class _Run:
    """A training run in processes of its own, stopped unless it is its turn."""

    def __init__(self, launcher: list[str], where: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray-overhead-")
        self._output = Path(self._folder.name, "run")
        command = [sys.executable, *launcher, "-m", "sparsetrain", "train", where, str(CONFIG), *OVERRIDES]
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, f"output={self._output}"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "_Run":
        self._wait_until(lambda: len(self._rows()) >= WARMUP_STEPS)
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        self._folder.cleanup()

    def turn(self) -> float:
        """Train for a few seconds, and return the median step in seconds; steps that a stop cut in two do not count."""
        before = len(self._rows())
        self._signal(signal.SIGCONT)
        time.sleep(TURN_S)
        self._wait_until(lambda: len(self._rows()) >= before + 4)
        self._signal(signal.SIGSTOP)
        return median(row["step_time_s"] for row in self._rows()[before + 1 :])

    def _rows(self) -> list[dict[str, Any]]:
        return read_metrics(self._output) if (self._output / "metrics.jsonl").exists() else []

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not happened():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run ended or hangs:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)

    def _signal(self, number: int) -> None:
        """Send a signal to everything that belongs to the run."""
        import ray  # noqa: F401  # isort: skip  # it brings psutil along
        import psutil  # isort: skip

        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

"""From `sparsetrain submit` to the first training step: what a person waits for on a cluster that is already there.

A head with two CPUs is started on this machine, a first run warms it up, and then whole runs are submitted one after
another, each timed from the start of the command to the line of its first step.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.registry import AtMost, Bench, Row, Unavailable, case

CONFIG = Path(__file__).parents[3] / "configs" / "quick.yaml"
NUM_WORKERS = 2
OVERRIDES = (
    *("train.tokens=4Ki", "train.phases=[]", "train.eval_tokens=1Ki", "sparsity=[]"),
    f"cluster.workers={NUM_WORKERS}",
)
START_TIMEOUT_S = 120.0
MOST_RUNS = 5


@case(
    "submit_latency", f"from `sparsetrain submit` to the first step of {NUM_WORKERS} workers, on a warm local cluster"
)
def submit_latency(bench: Bench) -> Iterator[Row]:
    if find_spec("ray") is None:
        raise Unavailable("ray is not installed")
    if len(os.sched_getaffinity(0)) < NUM_WORKERS:
        raise Unavailable(f"{NUM_WORKERS} workers need as many CPUs")
    with tempfile.TemporaryDirectory(prefix="submit-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = _environment()
        with _head(Path(folder), environment) as address:
            _first_step_s(address, Path(folder, "warm-up"), environment)
            runs = min(bench.pairs, MOST_RUNS)
            samples = [_first_step_s(address, Path(folder, f"run{index}"), environment) for index in range(runs)]
    yield Row(f"submit to first step, {NUM_WORKERS} workers", samples, target=AtMost(20), note=f"{runs} runs")


def _environment() -> dict[str, str]:
    """Without Ray's variables of whoever calls, and with Python keeping what it has compiled, as a cluster's does."""
    left_out = ("RAY_", "PYTHONDONTWRITEBYTECODE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**inherited, **ray, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


@contextlib.contextmanager
def _head(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A Ray head on free ports; yields its job server."""
    import ray  # noqa: F401  # isort: skip  # it brings psutil along
    import psutil  # isort: skip

    from sparsetrain.testing import free_ports

    port, job_port, client, agent = free_ports(4)
    command = [
        *("ray", "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={NUM_WORKERS}", f"--port={port}"),
        *(f"--temp-dir={folder / 'ray'}", "--node-ip-address=127.0.0.1", "--include-dashboard=true"),
        *(
            f"--dashboard-port={job_port}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
        ),
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        for each in (port, job_port, agent):
            while not _is_open(each):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Ray did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
        yield f"http://127.0.0.1:{job_port}"
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=10)


def _is_open(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def _first_step_s(address: str, output: Path, environment: dict[str, str]) -> float:
    """Submit a run, wait for its end, and return the seconds to its first step."""
    command = ["sparsetrain", "submit", str(CONFIG), "--address", address, *OVERRIDES, f"output={output}"]
    began = time.monotonic()
    first_step = None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if first_step is None and line.startswith("step 1 "):
                first_step = time.monotonic() - began
    if process.returncode or first_step is None:
        raise RuntimeError(f"the run failed:\n{''.join(printed)[-3000:]}")
    return first_step

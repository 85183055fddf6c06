"""The two ways to hand a run to a cluster, on a real head that the test starts."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray  # noqa: F401  # isort: skip  # it brings psutil along
import psutil  # isort: skip

from sparsetrain.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
START_TIMEOUT_S = 120
TINY = ("train.tokens=4Ki", "train.phases=[]", "train.eval_tokens=1Ki")


@pytest.fixture(scope="module")
def job_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where relative outputs of jobs go."""
    return tmp_path_factory.mktemp("job-outputs")


@pytest.fixture(scope="module")
def job_server(job_outputs: Path) -> Iterator[str]:
    """A Ray head with its dashboard on free ports; every process of it is ended, however the test ends."""
    port, job_port, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="ray-head-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(PROGRAMS / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=true"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={job_port}"),
            # Two more that every head takes, also when nobody names them:
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        ]
        with Path(folder, "head.log").open("w") as log:
            environment = program_environment() | {"SPARSETRAIN_OUTPUT_ROOT": str(job_outputs)}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                wait_until_listening((port, job_port, agent), process, Path(log.name))
                yield f"http://127.0.0.1:{job_port}"
            finally:
                end_tree(process.pid)
                process.wait()


def program_environment() -> dict[str, str]:
    """This environment, with the interpreter that runs the tests first on the path and no Ray of anybody else."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(PROGRAMS), os.environ["PATH"]])
    return {**inherited, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def free_ports(count: int) -> list[int]:
    """Ports below the range from which the system, and so the rest of Ray, takes ports that nobody named."""
    found: list[int] = []
    while len(found) < count:
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("0.0.0.0", random.randrange(20_000, 32_000)))
            found.append(int(candidate.getsockname()[1]))
    return found


def wait_until_listening(ports: tuple[int, ...], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    for port in ports:
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert process.poll() is None, f"the head ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the head does not listen on {port}:\n{log.read_text()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)


def end_tree(pid: int) -> None:
    """Kill a process and all its descendants: gcs_server ignores anything milder."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, env=program_environment(), capture_output=True, text=True, timeout=300, check=False
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_ray_job_submit_and_sparsetrain_submit_run_the_same_job(
    job_server: str, job_outputs: Path, tmp_path: Path
) -> None:
    by_ray = run(
        *("ray", "job", "submit", "--address", job_server, "--runtime-env", "launch/runtime_env.yaml", "--"),
        *("python", "-m", "sparsetrain", "train", "quick.yaml", "output=by-ray", *TINY),
    )
    assert by_ray.returncode == 0, by_ray.stdout + by_ray.stderr
    assert f"using {job_outputs / 'by-ray'}" in by_ray.stdout
    by_us = run(
        *("sparsetrain", "submit", "configs/quick.yaml", "--address", job_server),
        *(f"output={tmp_path / 'by-us'}", *TINY),
    )
    assert by_us.returncode == 0, by_us.stdout + by_us.stderr
    assert len(losses(tmp_path / "by-us")) == 4
    assert losses(tmp_path / "by-us") == losses(job_outputs / "by-ray")
    for folder in (job_outputs / "by-ray", tmp_path / "by-us"):
        first_line = (folder / "logs" / "worker-0.log").read_text().splitlines()[0]
        assert first_line.count("py_modules_files") == 2, "both packages come with the job"


def test_a_users_error_in_a_worker_ends_the_job_without_a_restart(job_server: str, tmp_path: Path) -> None:
    diverging = ("optimizer.lr=1e30", "optimizer.grad_clip=null", "train.max_bad_steps=1")
    job = run(
        *("sparsetrain", "submit", "configs/quick.yaml", "--address", job_server),
        *(f"output={tmp_path / 'run'}", *TINY, *diverging),
    )
    assert job.returncode == 2
    assert job.stdout.count("train.max_bad_steps") == 1, job.stdout
    assert "restart" not in job.stdout + job.stderr
    assert job.stderr.startswith("error: job ")
    assert "failed" in job.stderr

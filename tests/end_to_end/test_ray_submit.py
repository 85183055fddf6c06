"""Handing runs to a cluster that asks for a token, and what becomes of them there: on a real head, started here."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

import ray  # noqa: F401  # isort: skip  # it brings psutil along
import psutil  # isort: skip

from sparsetrain.testing import free_ports
from sparsetrain.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
START_TIMEOUT_S = 120
TOKEN = uuid.uuid4().hex * 2
TINY = ("train.tokens=4Ki", "train.phases=[]", "train.eval_tokens=1Ki", "train.sample_tokens=2")


@pytest.fixture(scope="module")
def job_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where relative outputs of jobs go."""
    return tmp_path_factory.mktemp("job-outputs")


class Head(NamedTuple):
    """A running Ray head."""

    address: str
    """host:port for those who join it."""
    job_server: str
    """URL for those who hand it jobs."""


@pytest.fixture(scope="module")
def head(job_outputs: Path) -> Iterator[Head]:
    """A Ray head with its dashboard on free ports; every process of it is ended, however the test ends."""
    port, job_port, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="ray-head-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(PROGRAMS / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=3"),
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
                yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{job_port}")
            finally:
                end_tree(process.pid)
                process.wait()


@pytest.fixture(scope="module")
def job_server(head: Head) -> str:
    return head.job_server


def program_environment() -> dict[str, str]:
    """This environment, with the interpreter that runs the tests first on the path and our token alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(PROGRAMS), os.environ["PATH"]])
    return {
        **inherited,
        "PATH": path,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }


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


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=program_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


class Jobs(NamedTuple):
    """What became of jobs that end by themselves."""

    by_ray: subprocess.CompletedProcess[str]
    by_us: subprocess.CompletedProcess[str]
    by_us_output: Path
    diverging: subprocess.CompletedProcess[str]
    without_config: subprocess.CompletedProcess[str]
    checkup: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def jobs(job_server: str, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Submitted together, because they mostly wait; the checkup alone: it finds fault with nodes too busy to answer."""
    folder = tmp_path_factory.mktemp("runs")
    submit = ("sparsetrain", "submit", "configs/quick.yaml", "--address", job_server)
    by_ray = ("ray", "job", "submit", "--address", job_server, "--runtime-env", "launch/runtime_env.yaml", "--")
    train = (*by_ray, "python", "-m", "sparsetrain", "train")
    diverging = ("optimizer.lr=1e30", "optimizer.grad_clip=null", "train.max_bad_steps=1")
    with ThreadPoolExecutor() as threads:
        ran = threads.map(
            lambda command: run(*command),
            [
                (*train, "quick.yaml", "output=by-ray", *TINY),
                (*submit, f"output={folder / 'by-us'}", *TINY),
                (*submit, f"output={folder / 'diverging'}", *TINY, *diverging),
                (*train, "nowhere.yaml"),
            ],
        )
        ray_job, our_job, diverged, without_config = ran
    checkup = run("sparsetrain", "doctor", "--cluster", "--address", job_server)
    return Jobs(ray_job, our_job, folder / "by-us", diverged, without_config, checkup)


def test_ray_job_submit_and_sparsetrain_submit_run_the_same_job(jobs: Jobs, job_outputs: Path) -> None:
    assert jobs.by_ray.returncode == 0, jobs.by_ray.stdout + jobs.by_ray.stderr
    assert f"using {job_outputs / 'by-ray'}" in jobs.by_ray.stdout
    assert jobs.by_us.returncode == 0, jobs.by_us.stdout + jobs.by_us.stderr
    assert len(losses(jobs.by_us_output)) == 4
    assert losses(jobs.by_us_output) == losses(job_outputs / "by-ray")
    for folder in (job_outputs / "by-ray", jobs.by_us_output):
        first_line = (folder / "logs" / "worker-0.log").read_text().splitlines()[0]
        assert first_line.count("py_modules_files") == 2, "both packages come with the job"


def test_a_users_error_in_a_worker_ends_the_job_without_a_restart(jobs: Jobs) -> None:
    job = jobs.diverging
    assert job.returncode == 2
    assert job.stdout.count("train.max_bad_steps") == 1, job.stdout
    assert "restart" not in job.stdout + job.stderr
    assert job.stderr.startswith("error: job ")
    assert "failed" in job.stderr


def test_a_config_that_is_not_on_the_cluster_is_one_message(jobs: Jobs) -> None:
    assert jobs.without_config.returncode != 0
    assert "error: nowhere.yaml does not exist" in jobs.without_config.stdout
    assert "Traceback" not in jobs.without_config.stdout


def test_a_checkup_from_outside_sees_the_cluster(jobs: Jobs) -> None:
    assert jobs.checkup.returncode == 0, jobs.checkup.stdout + jobs.checkup.stderr
    assert "1 node\n" in jobs.checkup.stdout
    assert "no problems found" in jobs.checkup.stdout


def test_a_job_left_running_is_listed_watched_and_stopped(job_server: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    server = ("--address", job_server)
    submitted = run(
        *("sparsetrain", "submit", "configs/quick.yaml", *server, "--detach"),
        *(f"output={output}", "train.tokens=100M", "checkpoint.every_steps=10"),
    )
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[2].rstrip(";")
    watch = ["sparsetrain", "jobs", "logs", *server, job]
    with subprocess.Popen(watch, env=program_environment(), stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        seen = next(line for line in watching.stdout if line.startswith("checkpoint at step"))
        watching.send_signal(signal.SIGINT)
        rest = watching.stdout.read()
    assert seen.startswith("checkpoint at step 10")
    assert watching.returncode == 130
    assert f"{job} goes on" in rest
    status = run("sparsetrain", "jobs", "status", *server, job).stdout
    assert "running" in status
    assert f"output   {output}" in status
    trainers = processes_writing_to(output)
    assert len(trainers) == 1
    stopped = run("sparsetrain", "jobs", "stop", *server, job)
    assert stopped.stdout == f"{job}: stopped\n"
    assert psutil.wait_procs(trainers, timeout=60)[1] == [], "nothing of the job is left"
    listed = run("sparsetrain", "jobs", "list", *server).stdout
    assert [line.split()[1] for line in listed.splitlines() if job in line] == ["stopped"]
    assert run("sparsetrain", "jobs", "stop", *server, job).stdout == f"{job}: stopped\n"
    unknown = run("sparsetrain", "jobs", "logs", *server, "nobody")
    assert unknown.returncode == 2
    assert f"has no job nobody; the newest of its jobs: {job}" in unknown.stderr


def processes_writing_to(output: Path) -> list[psutil.Process]:
    """The workers of a run: they write their output to files in its folder."""
    log = str(output / "logs" / "worker-0.log")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.readlink(f"/proc/{process.pid}/fd/1") == log:
                found.append(process)
    return found


def test_what_the_cluster_would_refuse_is_one_message_and_no_job(head: Head) -> None:
    submit = ("sparsetrain", "submit", "configs/quick.yaml", "--address", head.job_server)
    join = ("sparsetrain", "doctor", "--cluster", "--address")
    wrong_token = {"RAY_AUTH_TOKEN": "f" * 64}
    # How many are free depends on when the head last counted what the jobs before left.
    room = r"asks for 4 CPUs; the cluster has 3 CPUs \(\d free\)\. To fix: lower cluster\.workers to 3"
    before = run("sparsetrain", "jobs", "list", "--address", head.job_server).stdout
    for command, environment, message in (
        (submit, {"RAY_AUTH_MODE": "disabled"}, "asks for a token: set RAY_AUTH_MODE=token"),
        (submit, wrong_token, "refuses the token in RAY_AUTH_TOKEN"),
        ((*submit, "cluster.workers=4"), {}, room),
        ((*join, head.address), wrong_token, f"{head.address} refuses the token in RAY_AUTH_TOKEN"),
        ((*join, urlsplit(head.job_server).netloc), {}, "is no Ray head"),
    ):
        refused = run(*command, **environment)
        assert refused.returncode == 2
        assert re.search(message, refused.stderr), refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert run("sparsetrain", "jobs", "list", "--address", head.job_server).stdout == before

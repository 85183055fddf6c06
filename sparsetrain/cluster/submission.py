"""Hand a run to a Ray cluster as a job, and follow its output."""

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from sparsetrain.cluster.packages import find_packages
from sparsetrain.cluster.paths import absolute_paths
from sparsetrain.cluster.session import check_reachable
from sparsetrain.config import RunConfig, dump_config, load_config
from sparsetrain.errors import ClusterError
from sparsetrain.training.run_folder import OnExisting

_JOB_SERVER_PORT = 8265
_MAX_UPLOAD_BYTES = 100 * 2**20
"""What Ray's job server takes in one package."""
_POLL_S = 0.5
_HEAD_START_S = 20.0
"""A head that has just started answers before it can take jobs."""
_EXCLUDED = ("**/__pycache__", "**/.*_cache")

for _name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # they report every upload otherwise


def submit(
    config: RunConfig | str | Path,
    *,
    address: str = "auto",
    overrides: Sequence[str] = (),
    detach: bool = False,
    on_existing: OnExisting = "refuse",
    write: Callable[[str], None] | None = None,
) -> str:
    """Submit a run as a Ray job. The YAML and both packages travel with it; the cluster needs their dependencies.

    Relative paths of the config stay relative to the submitter's current directory, so the cluster must share its
    filesystem or the paths must be absolute ones of the cluster.

    Args:
        config: The run, or its YAML file.
        address: The job server: http://host:8265 or host:8265; "auto": $RAY_API_SERVER_ADDRESS, else this machine.
        overrides: `key=value` each, when `config` is a file.
        detach: Return as soon as the cluster has the job, instead of following its output to the end.
        on_existing: What to do about a run that `output` holds already.
        write: Takes the job's output in pieces; default standard output.

    Returns:
        The job's id.

    Raises:
        ConfigError: The YAML or an override is wrong.
        ClusterError: The job server cannot be reached, the upload is too large, or the job did not succeed.
    """
    run = config if isinstance(config, RunConfig) else load_config(config, overrides)
    client = _connect(address)
    packages = find_packages()
    with tempfile.TemporaryDirectory(prefix="sparsetrain-submit-") as folder:
        name = f"{run.name}.yaml"
        (Path(folder) / name).write_text(dump_config(absolute_paths(run, Path.cwd())))
        runtime_env = {
            "working_dir": folder,
            "py_modules": [str(packages.library), str(packages.kernels)],
            "excludes": list(_EXCLUDED),
        }
        check_upload_size([packages.library, packages.kernels])
        flags = {"refuse": "", "resume": " --resume", "overwrite": " --overwrite"}[on_existing]
        job = _submit_job(client, f"python -m sparsetrain train {name}{flags}", runtime_env)
    if not detach:
        _follow(client, job, address, write or _write)
    return job


def check_upload_size(roots: Sequence[Path], *, limit: int = _MAX_UPLOAD_BYTES) -> None:
    """Refuse a package folder that Ray would refuse after uploading it.

    Raises:
        ClusterError: A folder is larger than `limit` bytes; the message names its largest files.
    """
    for root in roots:
        sizes = {
            path: path.stat().st_size for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }
        if sum(sizes.values()) > limit:
            largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
            lines = [f"  {sizes[path] / 2**20:.1f} MiB  {path}" for path in largest]
            raise ClusterError(
                f"{root} has {sum(sizes.values()) / 2**20:.0f} MiB, and Ray uploads at most {limit / 2**20:g} MiB. "
                "Move what does not belong to the package out of it; the largest files:\n" + "\n".join(lines)
            )


def _connect(address: str) -> JobSubmissionClient:
    if address == "auto":
        address = os.environ.get("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{_JOB_SERVER_PORT}")
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"--address {address} is not a job server: expected http://host:{_JOB_SERVER_PORT}")
    port = parts.port or (443 if parts.scheme == "https" else _JOB_SERVER_PORT)
    check_reachable(f"{parts.hostname}:{port}")
    try:
        return JobSubmissionClient(url)
    except (AuthenticationError, RuntimeError, OSError, ValueError) as error:
        raise ClusterError(
            f"{address} does not answer like a Ray job server (the dashboard's port, {_JOB_SERVER_PORT} by default): "
            f"{error}"
        ) from error


def _submit_job(client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    deadline = time.monotonic() + _HEAD_START_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
        except (RuntimeError, ValueError, OSError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"the job server refused the job: {error}") from error
        time.sleep(_POLL_S)


def _follow(client: JobSubmissionClient, job: str, address: str, write: Callable[[str], None]) -> None:
    """Pass on a job's output until it ends; raise when it did not succeed."""
    write(f"submitted as {job}; Ctrl-C leaves it running\n")
    try:
        asyncio.run(_tail(client, job, write))
    except KeyboardInterrupt:
        write(
            f"\n{job} goes on. Follow it with: ray job logs --address {address} --follow {job}\n"
            f"Stop it with: ray job stop --address {address} {job}\n"
        )
        raise
    info = client.get_job_info(job)
    if info.status != JobStatus.SUCCEEDED:
        raise ClusterError(f"job {job} {str(info.status).lower()}; its last lines above say why")


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
    """The connection may break off before the job ends: then take up its output again where it stopped."""
    written = 0
    while True:
        seen = 0
        with suppress(RuntimeError, OSError):
            async for piece in client.tail_job_logs(job):
                fresh = piece[max(0, written - seen) :]
                seen += len(piece)
                written = max(written, seen)
                if fresh:
                    write(fresh)
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(_POLL_S)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

"""A connection to a Ray cluster's job server: every failure is one message, and comes within seconds."""

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from sparsetrain.cluster.head import check_reachable, refused_token
from sparsetrain.cluster.resources import Request, shortage
from sparsetrain.errors import ClusterError

_PORT = 8265
_ANSWER_TIMEOUT_S = 30.0
_HEAD_START_S = 20.0
"""A head that has just started answers before it can take jobs."""
_COUNT_S = 8.0
"""A head counts its nodes every few seconds: one that has just joined is not there yet."""
_POLL_S = 0.5
_STOP_TIMEOUT_S = 60.0
_MAX_JOBS_NAMED = 5

_Result = TypeVar("_Result")

for _name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # they report every upload otherwise


class JobServer:
    """The jobs of one Ray cluster.

    Args:
        address: http://host:8265 or host:8265; "auto": $RAY_API_SERVER_ADDRESS, else this machine.

    Raises:
        ClusterError: Nobody answers there, it is no job server, it wants another token, or runs another Ray.
    """

    def __init__(self, address: str = "auto") -> None:
        self.address = _url(address)
        try:
            self.client = _Client(self.address)
        except AuthenticationError:
            raise ClusterError(refused_token(self.address)) from None
        except (RuntimeError, OSError, ValueError) as error:
            raise ClusterError(
                f"{self.address} does not answer like a Ray job server (the dashboard's port, {_PORT} by default): "
                f"{error}"
            ) from error
        _check_version(self.address, str(self.client.running_ray_version))

    def submit(self, entrypoint: str, runtime_env: Mapping[str, Any], *, name: str, metadata: Mapping[str, str]) -> str:
        """Upload what travels with a job and submit it; returns its id, `name` and something that tells it apart.

        Raises:
            ClusterError: The job server does not take it.
        """
        deadline = time.monotonic() + _HEAD_START_S
        job = f"{name}-{os.urandom(3).hex()}"
        while True:
            try:
                return str(
                    self.client.submit_job(
                        entrypoint=entrypoint,
                        runtime_env=dict(runtime_env),
                        submission_id=job,
                        metadata=dict(metadata),
                    )
                )
            except (RuntimeError, ValueError, OSError) as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ClusterError(f"{self.address} does not take the job: {error}") from error
            time.sleep(_POLL_S)

    def list(self) -> list[JobDetails]:
        """All jobs that were submitted, the newest first; drivers that joined the cluster by themselves are no jobs."""
        jobs = [job for job in self._ask(self.client.list_jobs) if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def details(self, job: str) -> JobDetails:
        """What the cluster knows about one job.

        Raises:
            ClusterError: There is no such job.
        """
        jobs = self.list()
        for each in jobs:
            if each.submission_id == job:
                return each
        known = ", ".join(str(each.submission_id) for each in jobs[:_MAX_JOBS_NAMED])
        has = f"the newest of its jobs: {known}" if known else "it has no jobs at all"
        raise ClusterError(f"{self.address} has no job {job}; {has}")

    def log(self, job: str) -> str:
        """What a job has written so far.

        Raises:
            ClusterError: There is no such job.
        """
        self.details(job)
        return str(self._ask(lambda: self.client.get_job_logs(job)))

    def stop(self, job: str) -> str:
        """Stop a job, wait until it has ended, and return how: STOPPED, or what it had become before.

        Raises:
            ClusterError: There is no such job, or it does not end.
        """
        if (before := self.details(job).status).is_terminal():
            return str(before)
        self._ask(lambda: self.client.stop_job(job))
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not (status := self.details(job).status).is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job} was told to stop and has not ended within {_STOP_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        return str(status)

    def check_room(self, request: Request) -> None:
        """Refuse workers that the cluster has no room for even when nothing else runs.

        A cluster that may grow, or has only just started to count its nodes, is left to decide later.

        Raises:
            ClusterError: Too few CPUs or GPUs, seconds later still; the message says what there is and what is free.
        """
        deadline = time.monotonic() + _COUNT_S
        while (too_little := self._shortage(request)) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(too_little)
            time.sleep(_POLL_S)

    def _shortage(self, request: Request) -> str | None:
        answer = self._ask(lambda: self.client.get("/api/cluster_status"))
        status = (answer.get("data") or {}).get("clusterStatus") or {}
        nodes = (status.get("loadMetricsReport") or {}).get("usageByNode") or {}
        if not nodes or _may_grow(status.get("autoscalerReport") or {}):
            return None
        total = [{name: used_total[1] for name, used_total in node.items()} for node in nodes.values()]
        free = [{name: each[1] - each[0] for name, each in node.items()} for node in nodes.values()]
        return (
            None
            if request.fitting(total) >= request.workers
            else shortage(request, total, "the cluster has", free=free)
        )

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        try:
            return question()
        except AuthenticationError:
            raise ClusterError(refused_token(self.address)) from None
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"{self.address} has stopped answering: {error}") from error


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray is untyped
    """Ray's client with a time limit for answers: without one, a port that accepts and says nothing hangs for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        response: requests.Response = super()._do_request(method, endpoint, **{"timeout": _ANSWER_TIMEOUT_S, **options})
        return response

    @property
    def running_ray_version(self) -> str:
        """The cluster's version of Ray."""
        return str(self._server_ray_version)

    def get(self, endpoint: str) -> dict[str, Any]:
        """The JSON at an endpoint of the dashboard."""
        response = self._do_request("GET", endpoint)
        if response.status_code != requests.codes.ok:
            self._raise_error(response)
        return dict(response.json())


def _url(address: str) -> str:
    if address == "auto":
        address = os.environ.get("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{_PORT}")
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else _PORT)
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise ClusterError(f"{address} is not a job server: expected http://host:{_PORT}")
    check_reachable(f"{parts.hostname}:{port}")
    return url if parts.port else f"{url.rstrip('/')}:{port}"


def _check_version(address: str, cluster: str) -> None:
    def release(version: str) -> list[str]:
        return re.findall(r"\d+", version)[:2]

    if release(cluster) != release(ray.__version__):
        raise ClusterError(
            f"{address} runs Ray {cluster}, and here is Ray {ray.__version__}: install ray=={cluster} here, or start "
            "the cluster with this version."
        )


def _may_grow(report: Mapping[str, Any]) -> bool:
    """Whether an autoscaler could add nodes: without one, Ray makes up a type of its own for each node."""
    types = (report.get("nodeTypeMapping") or {}).items()
    return any(name != f"node_{node}" for node, name in types)

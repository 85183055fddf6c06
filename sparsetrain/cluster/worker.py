"""What runs on each Ray worker: the same `train` as without Ray, with its output in a file and its events sent home."""

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

from sparsetrain.cluster.events import EventSender
from sparsetrain.cluster.failures import RankError, log_path
from sparsetrain.cluster.packages import Packages, check_same, find_packages
from sparsetrain.config import RunConfig
from sparsetrain.errors import ClusterError, RankLostError, SparsetrainError
from sparsetrain.parallel.fssdp.groups import NODE_VARIABLE
from sparsetrain.training import train


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker."""

    config: RunConfig
    """With absolute paths."""
    profile: bool
    hub: Any
    """Actor that takes rank 0's events."""
    driver_packages: Packages
    log_folder: Path
    marker: Path
    """File that the driver made in the run folder: a worker that does not see it is on another filesystem."""
    num_threads: int


def run_worker(task: WorkerTask) -> dict[str, Any]:
    """Train on this rank.

    A group that Ray restarts calls this again, so it always resumes from the last checkpoint, if there is one; whether
    an existing run may be resumed or overwritten was settled by the driver.

    Returns:
        The run's summary.

    Raises:
        SparsetrainError: As `train` raises it; never retried.
        RankError: Anything else that went wrong.
    """
    rank = ray.train.get_context().get_world_rank()
    _check_shared_folder(task)
    _redirect_output(log_path(task.log_folder, rank))
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it would repeat each traceback
    try:
        packages = find_packages()
        print(f"rank {rank} on {ray.util.get_node_ip_address()}, pid {os.getpid()}: {packages}", flush=True)
        print(f"node {os.environ.get(NODE_VARIABLE)}, {os.environ.get('GLOO_SOCKET_IFNAME')}", flush=True)
        check_same(packages, task.driver_packages)
        torch.set_num_threads(task.num_threads)
        with EventSender(task.hub) as sender:
            return train(
                task.config, on_existing="resume", reporter=sender.send if rank == 0 else None, profile=task.profile
            )
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, SparsetrainError) and not isinstance(error, RankLostError):
            raise
        raise RankError.from_exception(error) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _check_shared_folder(task: WorkerTask) -> None:
    if not task.marker.exists():
        raise ClusterError(
            f"output={task.config.output} on node {ray.util.get_node_ip_address()} is not the folder that the driver "
            "sees. Set output to a folder on a filesystem that all nodes share."
        )


def _redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, native code included, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)

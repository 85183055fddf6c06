"""Everything that talks to Ray: training on a local Ray or a cluster, and handing runs to a cluster as jobs.

Names are imported when they are first used: the processes that Ray starts need only a part of this.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ClusterError

if TYPE_CHECKING:
    from sparsetrain.cluster.checkup import check_cluster
    from sparsetrain.cluster.job_server import JobServer
    from sparsetrain.cluster.job_table import print_job, print_jobs
    from sparsetrain.cluster.submission import follow_job, print_log, submit, submit_checkup
    from sparsetrain.cluster.trainer import run_on_ray

__all__ = [
    "JobServer",
    "check_cluster",
    "follow_job",
    "print_job",
    "print_jobs",
    "print_log",
    "run_on_ray",
    "submit",
    "submit_checkup",
]

_HOME = {
    "check_cluster": "sparsetrain.cluster.checkup",
    "submit_checkup": "sparsetrain.cluster.submission",
    "JobServer": "sparsetrain.cluster.job_server",
    "follow_job": "sparsetrain.cluster.submission",
    "print_job": "sparsetrain.cluster.job_table",
    "print_jobs": "sparsetrain.cluster.job_table",
    "print_log": "sparsetrain.cluster.submission",
    "run_on_ray": "sparsetrain.cluster.trainer",
    "submit": "sparsetrain.cluster.submission",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsetrain.cluster' has no attribute {name!r}")
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(
            "Ray is not installed. Install it with `pip install 'sparsetrain[ray]'`, or train without it: --in-process."
        )
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # from now on Python finds it without asking
    return value

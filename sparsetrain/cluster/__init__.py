"""Everything that talks to Ray: training on a local Ray or a cluster, and handing runs to a cluster as jobs."""

import importlib.util

from sparsetrain.errors import ClusterError

if importlib.util.find_spec("ray") is None:
    raise ClusterError(
        "Ray is not installed. Install it with `pip install 'sparsetrain[ray]'`, or train without it: --in-process."
    )

from sparsetrain.cluster.submit import submit
from sparsetrain.cluster.trainer import run_on_ray

__all__ = ["run_on_ray", "submit"]

"""The training loop and what surrounds it.

Read in this order: loop (the whole), step, phase_plan, sparse_phase, checkpointing, accounting.

Names are imported when they are first used: whoever only watches a run, or hands it to a cluster, needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetrain.training.checks import preflight
    from sparsetrain.training.export import export_run
    from sparsetrain.training.loop import train
    from sparsetrain.training.trained import TrainedRun, evaluate_run, generate_text

__all__ = ["TrainedRun", "evaluate_run", "export_run", "generate_text", "preflight", "train"]

_HOME = {
    "TrainedRun": "sparsetrain.training.trained",
    "evaluate_run": "sparsetrain.training.trained",
    "export_run": "sparsetrain.training.export",
    "generate_text": "sparsetrain.training.trained",
    "preflight": "sparsetrain.training.checks",
    "train": "sparsetrain.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsetrain.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # from now on Python finds it without asking
    return value

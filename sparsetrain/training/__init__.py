"""The training loop and what surrounds it.

Read in this order: loop (the whole), step, phase_plan, sparse_phase, checkpointing, accounting.
"""

from sparsetrain.training.loop import train
from sparsetrain.training.preflight import preflight
from sparsetrain.training.trained import TrainedRun, evaluate_run, generate_text

__all__ = ["TrainedRun", "evaluate_run", "generate_text", "preflight", "train"]

"""Checkpoints: saved whole or not at all, verified before use, and loadable at any layout and number of ranks."""

from sparsetrain.checkpoint.folder import list_checkpoints, step_of, verify_checkpoint
from sparsetrain.checkpoint.load import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_masks,
    load_weights,
    read_state,
)
from sparsetrain.checkpoint.optimizer import ensure_moments, load_optimizer_state, optimizer_state
from sparsetrain.checkpoint.save import save_checkpoint
from sparsetrain.checkpoint.saved_weights import SavedWeights, open_weights

__all__ = [
    "Checkpoint",
    "SavedWeights",
    "ensure_moments",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_masks",
    "load_optimizer_state",
    "load_weights",
    "open_weights",
    "optimizer_state",
    "read_state",
    "save_checkpoint",
    "step_of",
    "verify_checkpoint",
]

"""The random number generators of this process: Python's, and torch's on the CPU and the current device.

NumPy's global generator is left out: nothing here draws from it.
"""

import hashlib
import random
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """The state of every generator, as tensors and plain values."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back where `rng_state` found it; a GPU's is derived if none was used then."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if not torch.cuda.is_available():
        return
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    else:
        torch.cuda.manual_seed(_seed_from(state, 0))


def derive_rng_state(state: dict[str, Any], rank: int) -> None:
    """Seed every generator of a rank that was not there, from the state of one that was: the same each time."""
    seed = _seed_from(state, rank)
    random.seed(seed)
    torch.manual_seed(seed)


def _seed_from(state: dict[str, Any], rank: int) -> int:
    digest = hashlib.blake2b(state["torch"].numpy().tobytes() + rank.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1

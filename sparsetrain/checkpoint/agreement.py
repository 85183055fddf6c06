"""Work that one rank or every rank does, after which all ranks go on or all raise the same error.

A disk that is full on one host must not leave the ranks of the others waiting in the next collective.
"""

import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from sparsetrain.errors import SparsetrainError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    rank: int
    host: str
    kind: type[SparsetrainError] | None
    """Class of a user's error; None: a bug, shown with its traceback."""
    message: str


def in_group() -> bool:
    """Whether a process group is initialised; without one, this process is all there is."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank in the world, 0 without a process group."""
    return dist.get_rank() if in_group() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if in_group() else 1


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and tell its result to all; collective over the world.

    Args:
        work: Takes part in no collective; returns something small that can be pickled.

    Returns:
        The results by rank.

    Raises:
        SparsetrainError: `work` raised one on some rank: every rank raises the first of them.
        RuntimeError: `work` raised anything else on some rank. Without a process group its error is left as it is.
    """
    if not in_group():
        return [work()]
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, _attempt(work))
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        _raise(failures)
    return [result for result, _ in outcomes]


def on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and tell its result to all; collective over the world. Raises like on_every_rank."""
    if not in_group():
        return work()
    outcomes: list[Any] = [_attempt(work) if rank() == 0 else None]
    dist.broadcast_object_list(outcomes, src=0)
    result, failure = outcomes[0]
    if failure is not None:
        _raise([failure])
    done: T = result
    return done


def _attempt(work: Callable[[], T]) -> tuple[T | None, _Failure | None]:
    try:
        return work(), None
    except SparsetrainError as error:
        return None, _Failure(rank(), socket.gethostname(), type(error), str(error))
    except Exception:
        return None, _Failure(rank(), socket.gethostname(), None, traceback.format_exc())


def _raise(failures: list[_Failure]) -> NoReturn:
    first = next((failure for failure in failures if failure.kind is None), failures[0])
    if first.kind is None:
        raise RuntimeError(f"rank {first.rank} on {first.host} failed:\n{first.message}")
    raise first.kind(f"{first.message} (rank {first.rank} on {first.host})")

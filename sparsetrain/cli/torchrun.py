"""Whether torchrun started this process, and as which rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sparsetrain.cli.exit_codes import MISTAKE
from sparsetrain.errors import SparsetrainError


def torchrun_ranks() -> int | None:
    """The number of ranks that torchrun started, or None outside of it."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def torchrun_rank() -> int:
    """This process's rank; 0 outside of torchrun."""
    return int(os.environ["RANK"]) if torchrun_ranks() is not None else 0


@contextmanager
def told_by_rank_0() -> Iterator[None]:
    """End the other ranks without a word on an error of the user's that rank 0 meets and tells, too."""
    try:
        yield
    except SparsetrainError:
        if torchrun_rank() == 0:
            raise
        raise typer.Exit(MISTAKE) from None

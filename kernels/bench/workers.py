"""A process of its own for each side of a comparison, so that neither sees the other's allocator or settings."""

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

Step = Callable[[], object]


class Worker(AbstractContextManager["Worker"]):
    """Builds a step in a new process and runs it on demand; calling the worker runs one step to its end.

    Args:
        build: A function at module level that returns the step; called once in the new process.
        args: Its arguments.
        num_threads: Threads for torch in that process.
    """

    def __init__(self, build: Callable[..., Step], *args: Any, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, args, num_threads, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def __call__(self) -> None:
        """Run one step.

        Raises:
            RuntimeError: The step raised; the message is the worker's traceback.
        """
        self._connection.send(None)
        self._receive()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()  # which ends the worker's loop
        self._process.join()

    def _receive(self) -> None:
        try:
            failure: str | None = self._connection.recv()
        except EOFError:
            failure = "a benchmark's process died"
        if failure is not None:
            raise RuntimeError(failure)


def _serve(build: Callable[..., Step], args: tuple[Any, ...], num_threads: int, connection: Connection) -> None:
    try:
        torch.set_num_threads(num_threads)
        step = build(*args)
        connection.send(None)
        while True:
            connection.recv()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            connection.send(None)
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())

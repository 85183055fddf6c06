"""Run a function on several ranks of a process group on this machine, with a time limit."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

_START_LIMIT_S = 150.0
_READY = "ready"  # what a rank sends once it is in the process group; a result is pickled, so bytes


class DistributedTestError(AssertionError):
    """A rank failed or the ranks did not finish in time; the message holds each failing rank's traceback."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 240.0,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` ranks, each a fresh process inside an initialised process group.

    Args:
        fn: A function at module level (it is pickled). It learns its rank from torch.distributed.
        world_size: Number of ranks.
        backend: torch.distributed backend; "gloo" needs no GPU.
        timeout_s: Seconds after which all ranks are ended, counted from when all of them are in the process group
            (a busy machine may take long to start them); a hang becomes a failure that shows every rank's stack.

    Returns:
        What each rank returned (it is pickled), by rank.

    Raises:
        DistributedTestError: A rank raised, died, or did not finish in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sparsetrain-test-") as folder:
        ranks = []
        with _one_thread_each():
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank, args=(fn, args, kwargs, rank, world_size, backend, timeout_s, folder, sender)
                )
                process.start()
                sender.close()
                ranks.append((process, receiver))
        try:
            return _collect(ranks, timeout_s, folder)
        finally:
            for process, receiver in ranks:
                process.kill()
                process.join()
                receiver.close()


def _collect(ranks: Sequence[tuple[BaseProcess, Connection]], timeout_s: float, folder: str) -> list[Any]:
    limit_s = max(_START_LIMIT_S, timeout_s)
    deadline = time.monotonic() + limit_s
    starting = set(range(len(ranks)))
    pending = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            hung = ", ".join(map(str, sorted(pending.values())))
            what = "start" if starting else "finish"
            raise DistributedTestError(f"ranks {hung} did not {what} within {limit_s:g} s\n{_stacks(ranks, folder)}")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending[receiver]
            ok, payload = _receive(receiver, ranks[rank][0])
            if payload == _READY:
                starting.remove(rank)
                if not starting and not failures:
                    limit_s = timeout_s
                    deadline = time.monotonic() + limit_s
                continue
            del pending[receiver]
            if ok:
                results[rank] = pickle.loads(payload)
            else:
                failures[rank] = payload
                # One failure makes the peers fail too, or hang: wait a moment for their side of it, no longer.
                deadline = min(deadline, time.monotonic() + 2.0)
    if failures:
        raise DistributedTestError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(ranks))]


def _receive(receiver: Connection, process: BaseProcess) -> tuple[bool, Any]:
    try:
        ok, payload = receiver.recv()
    except EOFError:
        process.join(5.0)
        return False, f"died without a word (exit code {process.exitcode})"
    return ok, payload


def _run_rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rank: int,
    world_size: int,
    backend: str,
    timeout_s: float,
    folder: str,
    sender: Connection,
) -> None:
    with open(os.path.join(folder, f"stack-{rank}.txt"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)  # the parent asks a hanging rank for its stack
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            dist.init_process_group(
                backend,
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=max(_START_LIMIT_S, timeout_s)),
            )
            sender.send((True, _READY))
            result = pickle.dumps(fn(*args, **kwargs))
            # Leave together: a rank that is gone would break the collectives of those still at work.
            dist.barrier()
            dist.destroy_process_group()
            sender.send((True, result))
        except BaseException:
            sender.send((False, traceback.format_exc()))
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def _stacks(ranks: Sequence[tuple[BaseProcess, Connection]], folder: str) -> str:
    """Ask every rank still alive where it is."""
    for process, _ in ranks:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    for process, _ in ranks:
        process.join(0.5)  # time to write; a rank that has nothing to say has ended already
    texts = []
    for name in sorted(os.listdir(folder)):
        if name.startswith("stack-"):
            with open(os.path.join(folder, name)) as file:
                texts.append(f"--- {name.removesuffix('.txt')} ---\n{file.read()}")
    return "\n".join(texts)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children inherit the environment: without this, every rank would start a thread for every core."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before

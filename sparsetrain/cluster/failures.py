"""What went wrong on which rank, in words, and when a restart cannot help."""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train.v2.api.callback import UserCallback

from sparsetrain.cluster.events import put_events
from sparsetrain.cluster.resources import forget_lost_nodes
from sparsetrain.errors import SparsetrainError

MAX_RANKS_SHOWN = 6
"""With the lines around them, a summary stays within 15 lines."""


class Cause(Enum):
    """How a rank failed; the order is how likely it is to be the cause of what the other ranks report."""

    DIED = 0
    HUNG = 1
    RAISED = 2
    LOST_PEER = 3


@dataclass(frozen=True)
class RankFailure:
    """What became of one rank."""

    cause: Cause
    text: str


@dataclass(frozen=True)
class GroupFailed:
    """A group of workers failed: what each failing rank said, by rank."""

    ranks: Mapping[int, RankFailure]

    @property
    def first(self) -> tuple[int, RankFailure]:
        """The rank whose failure most likely brought down the others."""
        return min(self.ranks.items(), key=lambda item: (item[1].cause.value, item[0]))


class RankError(Exception):
    """An exception of the training loop on a worker, reduced to text so that it always crosses process borders."""

    def __init__(self, text: str, lost_peer: bool) -> None:
        super().__init__(text, lost_peer)
        self.text = text
        self.lost_peer = lost_peer

    @classmethod
    def from_exception(cls, error: BaseException) -> "RankError":
        """Keep the type, the first line of the message, and the place."""
        from sparsetrain.parallel import lost_a_rank  # late: Ray Train's controller, which waits for us, needs none

        message = (str(error).strip().splitlines() or [""])[0][:300]
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name})" if frames else ""
        return cls(f"{type(error).__name__}: {message}{place}", lost_a_rank(error))


class RestartUseless(Exception):
    """Ends a run on the controller: the group raised, and would do so again."""

    def __init__(self, failed: GroupFailed) -> None:
        super().__init__(failed)
        self.failed = failed


class FailurePolicy(UserCallback):  # type: ignore[misc]  # Ray is untyped
    """Runs on Ray Train's controller: decides which failures end the run at once, and tells the driver of the others.

    An exception raised here is not retried by the controller, whatever `FailureConfig.max_failures` says.

    Args:
        hub: Actor that takes events.
        is_elastic: The next group has as many workers as then fit: nodes that have gone must not be counted in.
    """

    def __init__(self, hub: Any, *, is_elastic: bool) -> None:
        self._hub = hub
        self._is_elastic = is_elastic
        self._steps_before = 0
        self._failure_before: RankFailure | None = None

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called once for each failed group.

        Raises:
            SparsetrainError: A worker raised it: the user's to mend, so restarting cannot help.
            RestartUseless: A worker raised before the group finished a step, or raised what ended the group before.
        """
        for error in worker_exceptions.values():
            if isinstance(error, SparsetrainError):
                raise error
        failed = GroupFailed({rank: describe(error) for rank, error in worker_exceptions.items()})
        steps, failure = ray.get(self._hub.num_steps.remote()), failed.first[1]
        if failure.cause is Cause.RAISED and (steps == self._steps_before or failure == self._failure_before):
            raise RestartUseless(failed)
        self._steps_before, self._failure_before = steps, failure
        put_events(self._hub, [failed])
        if self._is_elastic:
            forget_lost_nodes()


def describe(error: Exception) -> RankFailure:
    """Say what an exception that Ray Train collected from a rank means."""
    if isinstance(error, RankError):
        return RankFailure(Cause.LOST_PEER if error.lost_peer else Cause.RAISED, error.text)
    error = getattr(error, "health_check_failure", error)
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "memory monitor" in text or "due to memory pressure" in text:
        return RankFailure(Cause.DIED, "was killed by Ray because the node ran out of memory")
    if isinstance(error, NodeDiedError) or "node has died" in text or "node was terminated" in text:
        return RankFailure(Cause.DIED, "was on a node that died")
    if isinstance(error, RayActorError):
        return RankFailure(Cause.DIED, "died (killed from outside, out of memory, or crashed)")
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return RankFailure(Cause.HUNG, "stopped answering")
    return RankFailure(Cause.RAISED, f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0][:300]}")


def essence(error: Exception) -> str:
    """Type and most telling line of an error of Ray's own.

    Of what was raised in another process, Ray's text ends with what that was, and begins with where.
    """
    lines = str(error).strip().splitlines() or [""]
    raised_elsewhere = isinstance(error, RayTaskError) or "creation task" in lines[0]
    return f"{type(error).__name__}: {lines[-1 if raised_elsewhere else 0].strip()}"


def restart_notice(failed: GroupFailed, *, restarts: int, max_restarts: int, last_step: int | None) -> str:
    """One line about a restart: who failed, and where the run goes on."""
    rank, failure = failed.first
    where = "from the beginning, no checkpoint yet" if last_step is None else f"resuming from step {last_step}"
    return f"worker rank {rank} {_predicate(failure)}; group restarted, {where} ({restarts} of {max_restarts} restarts)"


def summary(failed: GroupFailed, *, world_size: int, tried: str, log_folder: Path, saved: str) -> str:
    """At most 15 lines: which rank, which exception, what was tried, where the full logs are.

    Args:
        failed: The last failure.
        world_size: Number of ranks.
        tried: What was done about it.
        log_folder: Folder of the workers' logs.
        saved: What was saved, and how to go on from it.
    """
    first, failure = failed.first
    lines = [f"worker rank {first} of {world_size} {_predicate(failure)}"]
    others = [(rank, other) for rank, other in sorted(failed.ranks.items()) if rank != first]
    lines += [f"  rank {rank} {_predicate(other)}" for rank, other in others[:MAX_RANKS_SHOWN]]
    if len(others) > MAX_RANKS_SHOWN:
        lines.append(f"  and {len(others) - MAX_RANKS_SHOWN} more ranks")
    return "\n".join([*lines, f"tried: {tried}", saved, f"full log: {log_path(log_folder, first)}"])


def log_path(log_folder: Path, rank: int) -> Path:
    """Where a worker's stdout and stderr go."""
    return log_folder / f"worker-{rank}.log"


def _predicate(failure: RankFailure) -> str:
    match failure.cause:
        case Cause.RAISED:
            return f"raised {failure.text}"
        case Cause.LOST_PEER:
            return "lost its connection to another rank"
    return failure.text

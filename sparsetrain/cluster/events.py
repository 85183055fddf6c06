"""Events from rank 0 to the driver: a small actor in between, a queue and a thread on the side of the training loop."""

import asyncio
import queue
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import ray

from sparsetrain.training.events import Event, StepDone

_BATCH_EVERY_S = 0.2


class EventHub:
    """Actor that holds events until the driver takes them."""

    def __init__(self) -> None:
        self._waiting: list[Any] = []
        self._arrived = asyncio.Event()
        self._num_steps = 0

    async def put(self, events: Sequence[Any]) -> None:
        """Append events."""
        self._waiting.extend(events)
        self._num_steps += sum(isinstance(event, StepDone) for event in events)
        self._arrived.set()

    async def take(self, timeout_s: float) -> list[Any]:
        """All events since the last call; waits up to `timeout_s` seconds for the first."""
        if not self._waiting and timeout_s > 0:
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except TimeoutError:
                return []
        taken, self._waiting = self._waiting, []
        self._arrived.clear()
        return taken

    async def num_steps(self) -> int:
        """Optimizer steps seen so far, over all groups."""
        return self._num_steps


def start_hub() -> Any:
    """Start the actor on the driver's node; it needs no CPU and ends with the driver."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(num_cpus=0)(EventHub).options(scheduling_strategy=here).remote()


class EventSender:
    """Reporter on a worker: `send` only appends to a queue, a thread ships what has gathered a few times a second."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ship_until_stopped, name="event-sender", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ship what is left; every event has arrived when this returns."""
        self._stop.set()
        self._thread.join()
        self._ship()

    def send(self, event: Event) -> None:
        """Queue an event and return at once."""
        self._events.put(event)

    def _ship_until_stopped(self) -> None:
        while not self._stop.wait(_BATCH_EVERY_S):
            self._ship()

    def _ship(self) -> None:
        gathered = []
        while not self._events.empty():
            gathered.append(self._events.get())
        if gathered:
            ray.get(self._hub.put.remote(gathered))

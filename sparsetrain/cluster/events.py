"""Events from rank 0 to the driver: a queue and a thread on the side of the training loop, and an actor in between."""

import pickle
import queue
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sparsetrain.cluster.hub import EventHub
from sparsetrain.training.events import Event, StepDone

_BATCH_EVERY_S = 0.5


def start_hub() -> Any:
    """Start the actor on the driver's node; it needs no CPU and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventHub).options(scheduling_strategy=here).remote()


def put_events(hub: Any, events: Sequence[Any]) -> None:
    """Hand events to the actor and wait until it has them."""
    ray.get(hub.put.remote(pickle.dumps(list(events)), sum(isinstance(event, StepDone) for event in events)))


def take_events(hub: Any, timeout_s: float) -> list[Any]:
    """All events since the last call; waits up to `timeout_s` seconds for the first."""
    return [event for batch in ray.get(hub.take.remote(timeout_s)) for event in pickle.loads(batch)]


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
            put_events(self._hub, gathered)

import asyncio
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest

from sparsetrain.cluster import events
from sparsetrain.cluster.events import EventSender, put_events, take_events
from sparsetrain.cluster.hub import EventHub
from sparsetrain.training.events import Event, Notice, StepDone


class LocalHub:
    """The actor without Ray: each call runs to its end on a loop of its own."""

    def __init__(self) -> None:
        self._hub = EventHub()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self.batches = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._hub, name)

        class Remote:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                with self._lock:
                    self.batches += name == "put"
                    return self._loop.run_until_complete(method(*arguments))

        return Remote


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    monkeypatch.setattr(events.ray, "get", lambda value: value)
    return LocalHub()


def test_events_arrive_once_and_in_order(hub: LocalHub) -> None:
    sent: list[Event] = [StepDone("pretrain", {"step": step}) for step in range(100)]
    with EventSender(hub) as sender:
        for event in sent:
            sender.send(event)
    assert take_events(hub, 0) == sent
    assert take_events(hub, 0) == []
    assert hub.batches < 10, "many events travel together"


def test_only_steps_are_counted_as_progress(hub: LocalHub) -> None:
    put_events(hub, [Notice("hello"), StepDone("pretrain", {"step": 1}), StepDone("pretrain", {"step": 2})])
    assert hub.num_steps.remote() == 2


def test_taking_waits_for_the_first_event_only_so_long(hub: LocalHub) -> None:
    assert take_events(hub, 0.01) == []


async def put_late(hub: EventHub) -> list[bytes]:
    take = asyncio.create_task(hub.take(60.0))
    await asyncio.sleep(0)
    await hub.put(pickle.dumps([Notice("late")]), 0)
    return await take


def test_taking_returns_as_soon_as_something_arrives() -> None:
    assert len(asyncio.run(put_late(EventHub()))) == 1


def test_the_actors_process_needs_no_torch() -> None:
    code = "import sys, sparsetrain.cluster.hub; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_ray_trains_controller_loads_little_of_ours() -> None:
    """The workers start only when it has loaded what it needs."""
    code = (
        "import sys, sparsetrain.cluster.failures, sparsetrain.cluster.rendezvous\n"
        "sys.exit('sparsetrain.parallel' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The actor between rank 0 and the driver. It imports nothing of ours, so that its process starts in a moment."""

import asyncio


class EventHub:
    """Holds batches of events, pickled, until the driver takes them."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._arrived = asyncio.Event()
        self._num_steps = 0

    async def put(self, batch: bytes, num_steps: int) -> None:
        """Append a batch, in which `num_steps` events are optimizer steps."""
        self._waiting.append(batch)
        self._num_steps += num_steps
        self._arrived.set()

    async def take(self, timeout_s: float) -> list[bytes]:
        """All batches since the last call; waits up to `timeout_s` seconds for the first."""
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

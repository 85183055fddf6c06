"""Ports for servers that tests start."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Different ports on which nothing listens on this machine at this moment.

    They lie in 20 000 to 32 000, below the range from which Linux gives ports to those who name none: whatever else
    starts before the server does will not be given one of them.
    """
    found: set[int] = set()
    while len(found) < count:
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("0.0.0.0", random.randrange(20_000, 32_000)))
            found.add(int(candidate.getsockname()[1]))
    return list(found)

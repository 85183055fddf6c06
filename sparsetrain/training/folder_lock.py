"""A lock on a folder that lasts as long as the process that holds it, however that ends."""

import errno
import fcntl
import os
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Self

from sparsetrain.errors import RunFolderError

_POLL_S = 0.1


class FolderLock:
    """Held until `release`, or until the process is gone; at most one process on all machines holds it.

    Args:
        path: The lock's file, which stays when the lock is released.
        wait_s: How long to wait for another process to let go.

    Raises:
        RunFolderError: Another process holds it; the message says which.
        OSError: The file cannot be made.
    """

    def __init__(self, path: Path, *, wait_s: float = 0.0) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.release = weakref.finalize(self, os.close, descriptor)
        """Let go; harmless a second time."""
        self.supported = _lock(descriptor, path, time.monotonic() + wait_s)
        """False on a file system without locks: then two processes are not kept apart."""
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {_now()}".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock of this file."""
    try:
        with FolderLock(path):
            return False
    except RunFolderError:
        return True


def _lock(descriptor: int, path: Path, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
                raise RunFolderError(
                    f"output={path.parent} is in use: {holder} trains into it. Wait for it or end it, or set output to "
                    "another folder"
                ) from None
            time.sleep(_POLL_S)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return False
            raise


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")

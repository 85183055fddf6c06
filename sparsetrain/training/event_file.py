"""TensorBoard event files of scalars, written in this thread and without torch or TensorFlow.

TensorBoard's own EventFileWriter writes in a background thread, where a full disk is a traceback that nobody catches.
"""

import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """One event file of one process; TensorBoard shows all files of a folder as one run.

    Args:
        folder: Where the file goes; made if missing.
        first_step: First step that this file may hold. What older files of the folder say about it and later steps is
            hidden by TensorBoard, because a resumed run does those steps again.

    Raises:
        OSError: The folder or the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imported late: a fifth of a second that reading metrics back need not wait for.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(self.path.open("wb"))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add the finite numbers among `scalars`, by tag, at `step`.

        Raises:
            OSError: The file cannot be written.
        """
        values = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ]
        if values:
            self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Flush and close the file; harmless a second time."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

"""Gloo's threads come to rest before the interpreter ends, so that a program ends as it should.

A collective on gloo runs in a thread of its group. The thread first wakes whoever waits for the collective and then
lets go of its tensors, which takes Python's global lock wherever Python knows the tensor. If the program comes to its
end in between, Python ends the thread while it asks for the lock; it does so inside a destructor, and C++ aborts the
process: "terminate called without an active exception", SIGABRT, when all work was done.

`destroy_process_group` waits for the threads of the groups that nothing else holds. A model in DDP, a mesh and experts
that are spread over ranks hold theirs to the end of the process, so whoever has a model at the end would need luck.
"""

import atexit
import time
from pathlib import Path

_THREAD = "pt_gloo_runloop"
_TOLD = ("State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")  # sandboxes may leave out the counts
_LOOK_EVERY_S = 0.01
"""Longer than Python's switch interval: within it, a thread that waits for the global lock moves."""
_LIMIT_S = 10.0
"""For a collective that is computing still and that nobody waits for; the process then ends as it would have."""


def rest_before_exit() -> None:
    """Have the end of the process wait for gloo's threads, for 10 s at most.

    It sees threads in Linux's /proc; on other systems the end waits for nothing.
    """
    atexit.register(_wait_for_threads)


def _wait_for_threads() -> None:
    deadline = time.monotonic() + _LIMIT_S
    before, now = None, _moves()
    while now and (now != before or not _all_sleep(now)) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)  # lets go of the global lock: a thread that wants it gets it
        before, now = now, _moves()


def _moves() -> dict[str, dict[str, str]]:
    """By thread of gloo, its state and how often it has gone to sleep: these differ if it has moved in between."""
    threads = {}
    for path in Path("/proc/self/task").glob("*/status"):
        try:
            lines = path.read_text(errors="replace").splitlines()  # a thread's name may be any bytes
        except OSError:  # it has ended since it was listed
            continue
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if status.get("Name") == _THREAD:
            threads[path.parent.name] = {key: status.get(key, "") for key in _TOLD}
    return threads


def _all_sleep(threads: dict[str, dict[str, str]]) -> bool:
    return all(thread["State"].startswith("S") for thread in threads.values())

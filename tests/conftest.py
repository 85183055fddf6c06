"""What every test runs under: one thread a process, because the tests run in parallel; Ray in one place at a time."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray kills workers when the machine's memory runs low: what else runs there is not to decide a test.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, Triton's kernels run in its interpreter, which has to be known before anything at all imports Triton:
# functions of its own library that were decorated earlier cannot be called by interpreted kernels. Tests of any folder
# may bring Triton in, through torch.compile.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How fast examples are made and run says something about the machine, not about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

RAY_FILES = "test_ray_"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that start Ray in files of their own, by whose names they are kept apart below."""
    for item in items:
        if item.get_closest_marker("ray") and not item.path.name.startswith(RAY_FILES):
            raise pytest.UsageError(f"{item.nodeid} is marked ray: move it to a file called {RAY_FILES}*.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests that start Ray one after another, beginning with them: two clusters at once starve each other.

    pytest-xdist's own groups (`xdist_group`) have no effect under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if f"/{RAY_FILES}" in nodeid else nodeid

    return RayTogether(config, log)

"""`--profile`: a torch.profiler trace of a few early steps, one file a rank."""

from pathlib import Path
from typing import Self

from torch.profiler import ProfilerActivity, profile, schedule

from sparsetrain.parallel import World

SKIPPED_STEPS = 2
"""Steps before the trace: the first ones allocate, compile and warm caches."""
TRACED_STEPS = 3


class Profiler:
    """Traces a few steps into `<run folder>/profile/rank<i>.json`, for any viewer of Chrome traces."""

    def __init__(self, folder: Path, world: World, enabled: bool) -> None:
        self._profile: profile | None = None
        if not enabled:
            return
        path = folder / "profile" / f"rank{world.rank}.json"
        path.parent.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=SKIPPED_STEPS, active=TRACED_STEPS, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
            record_shapes=True,
        )
        self._profile.start()

    def step_done(self) -> None:
        """Tell the profiler that an optimizer step is over."""
        if self._profile is not None:
            self._profile.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End tracing; a run shorter than the trace writes what there is."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

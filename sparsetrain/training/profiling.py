"""`--profile`: a torch.profiler trace of a few early steps, one file a rank."""

from pathlib import Path
from typing import Self

import torch
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


def out_of_memory_advice(error: BaseException, micro_batch_size: int) -> str | None:
    """Say which setting to lower if `error` means that memory has run out; None if it means something else."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return None
    return (
        f"out of memory with train.micro_batch_size={micro_batch_size}: lower it (train.batch_tokens "
        "stays the same), set train.activation_checkpointing=true, or spread the weights with parallel.shard=full"
    )

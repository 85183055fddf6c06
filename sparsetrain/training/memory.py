"""How much memory is free, and when it has run out: told apart from other errors, and which settings help."""

import os
from pathlib import Path

import torch

from sparsetrain.planning.hardware import describe_hardware

_MEMORY_INFO = Path("/proc/meminfo")


def free_memory_bytes(device: torch.device) -> int:
    """Memory that this rank may still take: of its GPU, or its share of what is free on its machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return _free_machine_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_machine_bytes() -> int:
    if _MEMORY_INFO.exists():
        for line in _MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return describe_hardware().memory_bytes  # not Linux: all there is


def out_of_memory_advice(error: BaseException, micro_batch_size: int) -> str | None:
    """Say which setting to lower if `error` means that memory has run out; None if it means something else."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return None
    return (
        f"out of memory with train.micro_batch_size={micro_batch_size}: lower it (train.batch_tokens "
        "stays the same), set train.activation_checkpointing=true, or spread the weights with parallel.shard=full"
    )

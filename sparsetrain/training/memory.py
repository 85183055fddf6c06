"""Out of memory: told apart from other errors, and which settings help."""

import torch


def out_of_memory_advice(error: BaseException, micro_batch_size: int) -> str | None:
    """Say which setting to lower if `error` means that memory has run out; None if it means something else."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return None
    return (
        f"out of memory with train.micro_batch_size={micro_batch_size}: lower it (train.batch_tokens "
        "stays the same), set train.activation_checkpointing=true, or spread the weights with parallel.shard=full"
    )

import pytest
import torch

from sparsetrain.training.memory import out_of_memory_advice


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
    ],
    ids=["cpu", "gpu", "python"],
)
def test_memory_that_has_run_out_names_the_settings_that_help(error: BaseException) -> None:
    advice = out_of_memory_advice(error, micro_batch_size=16)
    assert advice is not None
    assert advice.startswith("out of memory with train.micro_batch_size=16: lower it")
    assert "train.activation_checkpointing=true" in advice
    assert "parallel.shard=full" in advice


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("DefaultCPUAllocator")],
    ids=["shapes", "type"],
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert out_of_memory_advice(error, micro_batch_size=16) is None


def test_the_cpu_allocator_still_words_its_error_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8, device="cpu")
    assert out_of_memory_advice(caught.value, micro_batch_size=16) is not None

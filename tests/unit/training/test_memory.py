from pathlib import Path

import pytest
import torch

from sparsetrain.errors import PlacementError
from sparsetrain.training.memory import free_memory_bytes, out_of_memory_advice
from sparsetrain.training.setup import require_memory_for_replicas
from tests.training_runs import tiny_config


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


def test_spare_slots_that_do_not_fit_are_refused_with_what_would() -> None:
    moe = {"num_experts": 8, "ffn_dim": 1 << 16}
    config = tiny_config(Path(), model__moe=moe, parallel__experts="fssdp", parallel__fssdp__spare_slots=3, sparsity=[])
    expert = 3 * 16 * 65536 * 4  # bytes of a weight in fp32
    owned = 2 * 8 // 4 * expert * 4  # weight, gradient, two moments
    require_memory_for_replicas(config, world_size=4, free_bytes=owned + 3 * 3 * expert)

    message = r"parallel\.fssdp\.spare_slots = 3: 3 spare expert slots need 108 MiB .* use at most 2, or re-materialise"
    with pytest.raises(PlacementError, match=message):
        require_memory_for_replicas(config, world_size=4, free_bytes=owned + 3 * 3 * expert - 1)
    with pytest.raises(PlacementError, match="use at most 0"):
        require_memory_for_replicas(config, world_size=4, free_bytes=10 * 2**20)


def test_ranks_of_a_machine_share_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    info = Path("/proc/meminfo").read_text()
    total = 1024 * next(int(line.split()[1]) for line in info.splitlines() if line.startswith("MemTotal:"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_memory_bytes(torch.device("cpu")) <= total // 4

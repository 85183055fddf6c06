import pytest
import torch

from sparsetrain.planning import hardware
from sparsetrain.planning.hardware import describe_hardware, measured_matmul_peak


@pytest.fixture
def quick_peak(monkeypatch):
    """Small products and little time; measured anew in each test."""
    monkeypatch.setattr(hardware, "_ROWS", 64)
    monkeypatch.setattr(hardware, "_CPU_WIDTHS", (32, 64))
    monkeypatch.setattr(hardware, "_CPU_BUDGET_S", 0.01)
    hardware._measure_peak.cache_clear()
    yield
    hardware._measure_peak.cache_clear()


def count_matmuls(monkeypatch) -> list[tuple[int, torch.dtype, int]]:
    calls: list[tuple[int, torch.dtype, int]] = []
    multiply = torch.mm

    def counted(left, right, **keywords):
        calls.append((right.shape[0], right.dtype, torch.get_num_threads()))
        return multiply(left, right, **keywords)

    monkeypatch.setattr(torch, "mm", counted)
    return calls


@pytest.mark.usefixtures("quick_peak")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_is_positive_and_multiplies_in_the_dtype_asked_for(monkeypatch, dtype):
    calls = count_matmuls(monkeypatch)
    assert measured_matmul_peak("cpu", dtype) > 0
    assert {called for _, called, _ in calls} == {dtype}


@pytest.mark.usefixtures("quick_peak")
def test_peak_is_measured_once_a_process_for_each_dtype_and_thread_count(monkeypatch):
    first = measured_matmul_peak("cpu", torch.float32, threads=1)
    calls = count_matmuls(monkeypatch)
    assert measured_matmul_peak(torch.device("cpu"), torch.float32, threads=1) == first
    assert not calls
    measured_matmul_peak("cpu", torch.float32, threads=2)
    assert {threads for _, _, threads in calls} == {2}


@pytest.mark.usefixtures("quick_peak")
def test_threads_are_put_back():
    before = torch.get_num_threads()
    measured_matmul_peak("cpu", torch.float32, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("quick_peak")
def test_slow_dtype_is_measured_on_the_smallest_shape_alone(monkeypatch):
    monkeypatch.setattr(hardware, "_CPU_BUDGET_S", 0.0)
    calls = count_matmuls(monkeypatch)
    assert measured_matmul_peak("cpu", torch.float32) > 0
    assert {width for width, _, _ in calls} == {32}


@pytest.mark.usefixtures("quick_peak")
def test_peak_is_the_fastest_product_after_a_warm_up(monkeypatch):
    times = {32: iter([1e-9, 5e-4, 2e-4]), 64: iter([1e-9, 9e-4, 4e-4])}

    def time_once(work):
        return next(times[work().shape[1]], 7e-4)

    monkeypatch.setattr(hardware, "_time_on_cpu", time_once)
    assert measured_matmul_peak("cpu", torch.float32) == max(2 * 64 * 32**2 / 2e-4, 2 * 64 * 64**2 / 4e-4)


@pytest.mark.gpu
def test_gpu_multiplies_bf16_faster_than_fp32():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert measured_matmul_peak("cuda", torch.bfloat16) > measured_matmul_peak("cuda:0", torch.float32) > 1e11


def test_machine_is_described():
    machine = describe_hardware()
    assert machine.cpu_model
    assert 0 < machine.num_cores <= machine.num_machine_cores
    assert machine.memory_bytes > 2**28
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["python"].startswith("3.")


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8.0), ("150000 100000", 1.5), ("1600000 100000", 8.0), ("", 8.0)], ids=str
)
def test_container_quota_limits_the_cores(monkeypatch, quota, cores):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(hardware, "_first_line", lambda path: quota)
    assert hardware.usable_cores() == cores


def test_container_limit_counts_as_the_memory(monkeypatch):
    monkeypatch.setattr(hardware, "_first_line", lambda path: str(2**27))
    assert hardware._memory_bytes() == 2**27


def test_another_package_called_apex_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "apex" not in describe_hardware().versions
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").write_text("")
    assert "apex" in describe_hardware().versions

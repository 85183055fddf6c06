import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsetrain.planning.hardware import Gpu, Hardware
from sparsetrain.report import doctor
from sparsetrain.report.doctor import Findings, find_problems, print_doctor

HARDWARE = Hardware(
    cpu_model="Example 9000",
    num_cores=4.0,
    num_machine_cores=8,
    memory_bytes=16_000_000_000,
    gpus=(),
    has_native_bf16=True,
    versions={"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8"},
)
HEALTHY = Findings(
    hardware=HARDWARE,
    peaks={"fp32": 2e11, "bf16": 4.4e11},
    folder=Path("/home/somebody"),
    free_disk_bytes=77_000_000_000,
    shared_memory_bytes=8_000_000_000,
    compiler="g++",
    compiler_path="/usr/bin/g++",
    has_python_headers=True,
    has_nvidia_driver=False,
)
H200 = Gpu("NVIDIA H200", 150_000_000_000, (9, 0))


def on_gpu(*, triton: bool = True) -> Findings:
    versions = {**HARDWARE.versions, "cuda": "13.0", "nccl": "2.28.9", **({"triton": "3.7.1"} if triton else {})}
    return replace(HEALTHY, hardware=replace(HARDWARE, gpus=(H200,), versions=versions), has_nvidia_driver=True)


def printed(findings: Findings, monkeypatch: pytest.MonkeyPatch, width: int = 100) -> list[str]:
    monkeypatch.setattr(doctor, "examine", lambda folder: findings)
    console = Console(file=io.StringIO(), width=width)
    print_doctor(console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_cpu_machine_is_described_with_what_a_run_will_use(monkeypatch):
    lines = printed(HEALTHY, monkeypatch)
    for line in (
        "CPU Example 9000, 4 cores of the machine's 8",
        "memory 16 GB",
        "GPU none",
        "disk 77 GB free in /home/somebody",
        "measured matmul peak (load on the machine lowers it)",
        "fp32 200 GFLOP/s on 4 threads",
        "bf16 440 GFLOP/s on 4 threads, 2.2x fp32",
        "collectives gloo",
        "optimizer AdamW, torch's fused kernel",
        "precision fp32, or bf16 autocast (in hardware)",
        "torch.compile /usr/bin/g++; only with train.compile=true",
        "workers Ray, or this process with --in-process",
        "found python 3.11.7, torch 2.13.0, ray 2.60.0, deepspeed 0.19.8",
        "norms torch's fused kernels",
        "engines torch, deepspeed (DeepSpeed 0.19.8); not installed: the extra megatron",
        "no problems found",
    ):
        assert line in lines


def test_gpu_machine_is_described_with_what_a_run_will_use(monkeypatch):
    lines = printed(on_gpu(), monkeypatch)
    for line in (
        "GPU NVIDIA H200, 150 GB, compute capability 9.0",
        "bf16 440 GFLOP/s of one GPU, 2.2x fp32",
        "collectives NCCL 2.28.9",
        "precision fp32, or bf16 autocast on tensor cores",
        "torch.compile Triton and /usr/bin/g++; only with train.compile=true",
        "no problems found",
    ):
        assert line in lines


def without_ray() -> Findings:
    return replace(HEALTHY, hardware=replace(HARDWARE, versions={"torch": "2.13.0"}))


@pytest.mark.parametrize(
    ("findings", "what", "fix"),
    [
        (without_ray(), "Ray is not installed", "pip install 'sparsetrain[ray]'"),
        (replace(HEALTHY, compiler_path=None), "torch.compile finds no g++", "apt install g++"),
        (replace(HEALTHY, has_python_headers=False), "torch.compile finds no Python.h", "python3-dev"),
        (on_gpu(triton=False), "torch.compile finds no Triton", "pip install triton"),
        (replace(HEALTHY, has_nvidia_driver=True), "sees no GPU", "torch's CUDA build"),
        (replace(HEALTHY, free_disk_bytes=10**9), "only 1 GB are free in /home/somebody", "output and data.cache"),
        (replace(HEALTHY, hardware=replace(HARDWARE, memory_bytes=2 * 10**9)), "2 GB of memory", "cluster.workers=1"),
        (replace(HEALTHY, shared_memory_bytes=64 * 10**6), "/dev/shm has only 64 MB", "--shm-size"),
        (replace(HEALTHY, hardware=replace(HARDWARE, num_cores=1.0)), "a run has 1 cores", "cluster.workers=1"),
        (replace(HEALTHY, peaks={"fp32": 2e11, "bf16": 1e10}), "bf16 runs at 0.05", "train.precision=fp32"),
    ],
    ids=["ray", "compiler", "headers", "triton", "cuda-build", "disk", "memory", "shm", "one-core", "slow-bf16"],
)
def test_each_problem_comes_with_its_fix(monkeypatch, findings, what, fix):
    (problem,) = find_problems(findings)
    assert what in problem.what
    assert fix in problem.fix
    lines = printed(findings, monkeypatch, width=300)
    assert f"! {problem.what}" in lines
    assert problem.fix in lines
    assert "a problem" in lines


def test_healthy_machines_have_no_problems():
    assert find_problems(HEALTHY) == []
    assert find_problems(replace(HEALTHY, shared_memory_bytes=None)) == []
    assert find_problems(on_gpu()) == []


def test_machine_that_cannot_compile_says_so_where_it_would(monkeypatch):
    lines = printed(replace(HEALTHY, compiler_path=None), monkeypatch)
    assert "torch.compile cannot be used here, see below" in lines


def test_this_machine_can_be_examined(monkeypatch, tmp_path):
    asked: list[tuple[str, torch.dtype]] = []

    def peak(device: str, dtype: torch.dtype, *, threads: int) -> float:
        asked.append((device, dtype))
        return 1e11

    monkeypatch.setattr(doctor, "measured_matmul_peak", peak)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    findings = doctor.examine(tmp_path)
    device = "cuda" if findings.hardware.gpus else "cpu"
    assert asked == [(device, torch.float32), (device, torch.bfloat16)]
    assert findings.free_disk_bytes > 0
    assert findings.compiler_path is None
    assert any("no-such-compiler -O2" in problem.what for problem in find_problems(findings))


def test_the_times_that_kernels_are_chosen_by_are_named(monkeypatch):
    assert any("sparsetrain doctor --tune` measures them" in line for line in printed(HEALTHY, monkeypatch, width=160))
    tuned = replace(HEALTHY, kernel_table=Path("/cache/example.csv"))
    assert "kernels each call the fastest by the times in /cache/example.csv" in printed(tuned, monkeypatch)


def test_times_that_cannot_be_read_are_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETRAIN_DISPATCH_DIR", str(tmp_path))
    path = tmp_path / f"{doctor.hardware_name('cpu')}.csv"
    path.write_text("scribbles")
    found = doctor._find_kernel_table("cpu")
    assert found[0] == path
    (problem,) = find_problems(replace(HEALTHY, kernel_table=found[0], kernel_table_error=found[1]))
    assert str(path) in problem.what
    assert problem.fix == "delete it, or measure anew with `sparsetrain doctor --tune`"


def test_what_updates_and_normalises_is_named(monkeypatch):
    found = replace(on_gpu(), optimizer_kernel="Transformer Engine", norm_kernel="apex")
    lines = printed(found, monkeypatch)
    assert "optimizer AdamW, Transformer Engine's fused kernel" in lines
    assert "norms apex's fused kernels" in lines

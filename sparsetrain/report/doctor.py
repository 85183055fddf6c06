"""What this machine has, what a run will use of it, and what stands in the way."""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sparsetrain_kernels.dispatch import TableError, hardware_name, load_table, own_table, shipped_table

from sparsetrain.engines.fused_adam import AdamKernel, find_adam_kernel
from sparsetrain.models.norms import find_rms_norm
from sparsetrain.planning.hardware import Hardware, describe_hardware, measured_matmul_peak
from sparsetrain.training.formatting import quantity

_LITTLE_DISK_BYTES = 2e9
_LITTLE_MEMORY_BYTES = 3e9
_LITTLE_SHARED_MEMORY_BYTES = 0.5e9
_SHARED_MEMORY = Path("/dev/shm")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Findings:
    """What an examination of the machine has found."""

    hardware: Hardware
    peaks: dict[str, float]
    """Measured matmul peak by dtype, fp32 and bf16, of the GPU or of all cores together, FLOP/s."""
    folder: Path
    free_disk_bytes: int
    """Free where runs are written."""
    shared_memory_bytes: int | None
    """Size of /dev/shm, where Ray keeps objects; None where there is no such thing."""
    compiler: str
    """The C++ compiler that torch.compile calls."""
    compiler_path: str | None
    has_python_headers: bool
    has_nvidia_driver: bool
    optimizer_kernel: str = "torch"
    """The library whose kernel updates weights."""
    norm_kernel: str = "torch"
    """The library whose kernel normalises activations."""
    kernel_table: Path | None = None
    """Measured times that kernels are chosen by; None where there are none of this hardware."""
    kernel_table_error: str = ""
    """Why they cannot be read; empty where they can."""


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way, and the way around it."""

    what: str
    fix: str


def print_doctor(console: Console) -> None:
    """Examine the machine and print what it has, what a run will use of it, and what stands in the way.

    Takes a second or two, most of it to import torch and to measure the matmul peaks.
    """
    with console.status("measuring"):
        findings = examine(Path.cwd())
    for title, rows in (
        ("this machine", _machine_rows(findings)),
        ("measured matmul peak (load on the machine lowers it)", _peak_rows(findings)),
        ("engine torch will use", _engine_rows(findings)),
        ("libraries", _library_rows(findings)),
    ):
        console.print(f"\n [bold]{title}[/]")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=17, no_wrap=True)
        table.add_column()
        for label, text in rows:
            table.add_row(f"   {label}", escape(text))
        console.print(table)
    _print_problems(find_problems(findings), console)


def examine(folder: Path) -> Findings:
    """Look at the machine and time it; `folder` is where runs would be written."""
    hardware = describe_hardware()
    device = "cuda" if hardware.gpus else "cpu"
    threads = max(1, int(hardware.num_cores))
    table, table_error = _find_kernel_table(device)
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return Findings(
        hardware=hardware,
        peaks={
            "fp32": measured_matmul_peak(device, torch.float32, threads=threads),
            "bf16": measured_matmul_peak(device, torch.bfloat16, threads=threads),
        },
        folder=folder,
        free_disk_bytes=shutil.disk_usage(folder).free,
        shared_memory_bytes=shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.exists() else None,
        compiler=compiler,
        compiler_path=shutil.which(shlex.split(compiler)[0]),
        has_python_headers=(Path(sysconfig.get_path("include")) / "Python.h").exists(),
        has_nvidia_driver=_NVIDIA_DRIVER.exists(),
        optimizer_kernel=_library_of(find_adam_kernel() if device == "cuda" else None),
        norm_kernel="apex" if device == "cuda" and find_rms_norm() is not None else "torch",
        kernel_table=table,
        kernel_table_error=table_error,
    )


def _library_of(kernel: AdamKernel | None) -> str:
    return "torch" if kernel is None else kernel.library


def _find_kernel_table(device: str) -> tuple[Path | None, str]:
    hardware = hardware_name(device)
    places = [place for place in (own_table(hardware), shipped_table(hardware)) if place.is_file()]
    try:
        load_table(hardware, device)
    except TableError as error:
        return places[0], str(error)
    return (places[0] if places else None), ""


def find_problems(findings: Findings) -> list[Problem]:
    """What stands in the way of a run, the gravest first; empty where nothing does."""
    return [*_missing_parts(findings), *_scarce_resources(findings), *_slow_parts(findings)]


def _missing_parts(findings: Findings) -> list[Problem]:
    problems = []
    if findings.kernel_table_error:
        what, _, fix = findings.kernel_table_error.rpartition("; ")
        problems.append(Problem(f"the kernels' measured times cannot be read: {what}", fix))
    if findings.has_nvidia_driver and not findings.hardware.gpus:
        problems.append(
            Problem(
                f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU",
                "install torch's CUDA build for that driver: https://pytorch.org/get-started/locally",
            )
        )
    if "ray" not in findings.hardware.versions:
        problems.append(
            Problem("Ray is not installed", "pip install 'sparsetrain[ray]', or train with --in-process, without it")
        )
    lacks, fix = _compile_lacks(findings)
    if lacks:
        problems.append(Problem(f"torch.compile finds no {lacks}, and train.compile=true would fail", fix))
    return problems


def _compile_lacks(findings: Findings) -> tuple[str, str]:
    """What torch.compile would miss on this machine, and how to get it; empty where it misses nothing."""
    if findings.compiler_path is None:
        return findings.compiler, "install a C++ compiler (Debian, Ubuntu: apt install g++), or set CXX to yours"
    if not findings.has_python_headers:
        return "Python.h", "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
    if findings.hardware.gpus and "triton" not in findings.hardware.versions:
        return "Triton", "pip install triton, in the version that your torch names"
    return "", ""


def _scarce_resources(findings: Findings) -> list[Problem]:
    problems = []
    if findings.free_disk_bytes < _LITTLE_DISK_BYTES:
        problems.append(
            Problem(
                f"only {quantity(findings.free_disk_bytes, 'B')} are free in {findings.folder}",
                "free some space, or set output and data.cache to folders on a larger disk",
            )
        )
    if findings.hardware.memory_bytes < _LITTLE_MEMORY_BYTES:
        problems.append(
            Problem(
                f"there are only {quantity(findings.hardware.memory_bytes, 'B')} of memory",
                "set cluster.workers=1, or train with --in-process: Ray and each worker take about 0.5 GB",
            )
        )
    shared = findings.shared_memory_bytes
    if shared is not None and shared < _LITTLE_SHARED_MEMORY_BYTES:
        problems.append(
            Problem(
                f"{_SHARED_MEMORY} has only {quantity(shared, 'B')}, and Ray would keep its objects on the disk",
                "in a container, give it more: docker run --shm-size=2g",
            )
        )
    if findings.hardware.num_cores < 2:
        problems.append(
            Problem(
                f"a run has {findings.hardware.num_cores:g} cores, and two workers ask for a core each",
                "set cluster.workers=1",
            )
        )
    return problems


def _slow_parts(findings: Findings) -> list[Problem]:
    fp32, bf16 = findings.peaks["fp32"], findings.peaks["bf16"]
    if bf16 >= fp32:
        return []
    return [Problem(f"bf16 runs at {bf16 / fp32:.2f} of the speed of fp32 here", "set train.precision=fp32")]


def _machine_rows(findings: Findings) -> list[tuple[str, str]]:
    hardware = findings.hardware
    cores = f"{hardware.num_cores:g} cores"
    if hardware.num_cores < hardware.num_machine_cores:
        cores += f" of the machine's {hardware.num_machine_cores}"
    gpus = [
        f"{gpu.name}, {quantity(gpu.memory_bytes, 'B')}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        for gpu in hardware.gpus
    ]
    return [
        ("CPU", f"{hardware.cpu_model}, {cores}"),
        ("memory", quantity(hardware.memory_bytes, "B")),
        *([("GPU", gpu) for gpu in gpus] or [("GPU", "none")]),
        ("disk", f"{quantity(findings.free_disk_bytes, 'B')} free in {findings.folder}"),
    ]


def _peak_rows(findings: Findings) -> list[tuple[str, str]]:
    where = "of one GPU" if findings.hardware.gpus else f"on {max(1, int(findings.hardware.num_cores))} threads"
    fp32, bf16 = findings.peaks["fp32"], findings.peaks["bf16"]
    return [
        ("fp32", f"{quantity(fp32, 'FLOP/s')} {where}"),
        ("bf16", f"{quantity(bf16, 'FLOP/s')} {where}, {bf16 / fp32:.1f}x fp32"),
    ]


def _engine_rows(findings: Findings) -> list[tuple[str, str]]:
    hardware = findings.hardware
    on_gpu = bool(hardware.gpus)
    if on_gpu:
        collectives, bf16 = f"NCCL {hardware.versions['nccl']}", "bf16 autocast on tensor cores"
    else:
        how = {True: "in hardware", False: "emulated", None: "see the measured peak"}[hardware.has_native_bf16]
        collectives, bf16 = "gloo", f"bf16 autocast ({how})"
    compiles = f"{'Triton and ' if on_gpu else ''}{findings.compiler_path}; only with train.compile=true"
    return [
        ("engines", _engines(hardware.versions)),
        ("collectives", collectives),
        ("optimizer", f"AdamW, {findings.optimizer_kernel}'s fused kernel"),
        ("norms", f"{findings.norm_kernel}'s fused kernels"),
        ("precision", f"fp32, or {bf16}"),
        ("torch.compile", "cannot be used here, see below" if _compile_lacks(findings)[0] else compiles),
        ("zeroed weights", "dense matmuls that multiply zeros like other weights: FLOPs saved are nominal"),
        ("kernels", _kernel_choice(findings.kernel_table)),
        ("workers", "Ray, or this process with --in-process" if "ray" in hardware.versions else "this process"),
    ]


def _kernel_choice(table: Path | None) -> str:
    if table is None:
        return "no times of this hardware to choose by: `sparsetrain doctor --tune` measures them in two minutes"
    return f"each call the fastest by the times in {table}"


def _engines(versions: Mapping[str, str]) -> str:
    """What parallel.engine may be here, and which extra brings the rest."""
    libraries = (("deepspeed", "deepspeed", "DeepSpeed"), ("megatron", "megatron-core", "Megatron-Core"))
    there = [f"{name} ({label} {versions[key]})" for name, key, label in libraries if key in versions]
    missing = [f"the extra {name}" for name, key, _ in libraries if key not in versions]
    installed = ", ".join(["torch", *there])
    return f"{installed}; not installed: {' and '.join(missing)}" if missing else installed


def _library_rows(findings: Findings) -> list[tuple[str, str]]:
    return [("found", ", ".join(f"{name} {version}" for name, version in findings.hardware.versions.items()))]


def _print_problems(problems: list[Problem], console: Console) -> None:
    if not problems:
        console.print("\n [green]no problems found[/]")
        return
    console.print(f"\n [bold yellow]{'a problem' if len(problems) == 1 else f'{len(problems)} problems'}[/]")
    table = Table.grid(padding=(0, 1))
    for problem in problems:
        table.add_row("   [yellow]![/]", f"{escape(problem.what)}\n[dim]{escape(problem.fix)}[/]")
    console.print(table)

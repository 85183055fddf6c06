"""What the machine has, and how fast it multiplies matrices.

The peak is measured because the nominal one (cores x clock x units, or a data sheet) is of a machine that nobody has.
Clocks fall under wide vector units or a power cap, containers see a share of the cores, a library may emulate a dtype.
An MFU over the nominal peak mixes all that with what the training code wastes; over the measured peak it is the latter.
"""

import importlib.util
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_ROWS = 4096
_CPU_WIDTHS = (128, 256, 512, 1024, 2048)
_CPU_BUDGET_S = 0.5
_GPU_WIDTHS = (1024, 2048, 4096, 8192)
_GPU_BUDGET_S = 0.2
_MIN_TIMES = 3

_LIBRARIES = ("torch", "triton", "ray", "deepspeed", "megatron-core", "transformer-engine", "tokenizers", "datasets")


def measured_matmul_peak(device: torch.device | str, dtype: torch.dtype, *, threads: int | None = None) -> float:
    """Measure the matmul peak of one device: [4096, n] @ [n, n] for a few n, the fastest product of all.

    The fastest, because whatever else runs on the machine meanwhile can only make the peak look lower, and thereby an
    MFU better than it is. Takes about half a second on a CPU and less on a GPU, once a process. Ranks of one machine
    should measure at the same time, because they will share its caches and memory when they train, too.

    Args:
        device: The CPU or a CUDA device.
        dtype: Of both factors and the product. For fp32 on a GPU torch.set_float32_matmul_precision counts.
        threads: Intra-op threads on a CPU; default what torch uses now.

    Returns:
        FLOP/s, a multiply-add being two.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _measure_peak(device, dtype, threads or torch.get_num_threads(), torch.get_float32_matmul_precision())


@cache
def _measure_peak(device: torch.device, dtype: torch.dtype, threads: int, _precision: str) -> float:
    on_gpu = device.type == "cuda"
    widths, budget_s = (_GPU_WIDTHS, _GPU_BUDGET_S) if on_gpu else (_CPU_WIDTHS, _CPU_BUDGET_S)
    time_once = _time_on_gpu if on_gpu else _time_on_cpu
    share_s = budget_s / len(widths)
    peak = 0.0
    here = torch.cuda.device(device) if on_gpu else nullcontext()
    with torch.no_grad(), _num_threads(threads), here:
        for width in widths:
            flops = 2 * _ROWS * width * width
            # The wide ones are for machines that need them; a dtype that the CPU emulates makes do with the first.
            if peak and (1 + _MIN_TIMES) * flops / peak > share_s:
                break
            peak = max(peak, flops / _fastest_matmul_s(device, dtype, width, time_once, share_s))
    return peak


def _fastest_matmul_s(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    time_once: Callable[[Callable[[], object]], float],
    budget_s: float,
) -> float:
    left = torch.randn(_ROWS, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    product = torch.empty(_ROWS, width, device=device, dtype=dtype)

    def multiply() -> torch.Tensor:
        return torch.mm(left, right, out=product)

    time_once(multiply)  # the first call picks a kernel and touches the memory
    until = time.perf_counter() + budget_s
    times = [time_once(multiply) for _ in range(_MIN_TIMES)]
    while time.perf_counter() < until:
        times.append(time_once(multiply))
    return min(times)


def _time_on_cpu(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _time_on_gpu(work: Callable[[], object], repeats: int = 10) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


@contextmanager
def _num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """Compute capability, for example (9, 0)."""


@dataclass(frozen=True)
class Hardware:
    """What this process may use of its machine."""

    cpu_model: str
    num_cores: float
    """Cores that this process may run on: fewer than the machine's under an affinity mask or a container's quota."""
    num_machine_cores: int
    memory_bytes: int
    """RAM, or the container's limit where that is lower."""
    gpus: tuple[Gpu, ...]
    has_native_bf16: bool | None
    """Whether the CPU multiplies bf16 in hardware; None where the operating system does not say."""
    versions: dict[str, str]
    """Version by name of Python, of CUDA and NCCL where torch has them, and of the libraries that are installed."""


def describe_hardware() -> Hardware:
    """Look at the machine; imports no library but torch, and starts nothing but torch's CUDA context."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(properties.name, properties.total_memory, (properties.major, properties.minor)))
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Hardware(
        cpu_model=info.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown",
        num_cores=usable_cores(),
        num_machine_cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        gpus=tuple(gpus),
        has_native_bf16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else None,
        versions=_versions(),
    )


def _cpu_info() -> dict[str, str]:
    """Read the first processor's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()


def usable_cores() -> float:
    """Cores that this process may run on: fewer than the machine's under an affinity mask or a container's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():  # "max 100000" without a limit
        return min(cores, int(quota) / int(period))
    return cores


def _memory_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line("/sys/fs/cgroup/memory.max")
    return min(memory, int(limit)) if limit.isdigit() else memory


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().split("\n")[0]
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if _has_nvidia_apex():
        versions["apex"] = "installed"
    return versions


def _has_nvidia_apex() -> bool:
    """Whether apex is NVIDIA's, whose version tells nothing; PyPI's package of that name has no optimizers."""
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "optimizers" / "fused_adam.py").exists() for folder in folders or [])

"""What the figures were measured on: printed above the table and written beside every row."""

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("sparsetrain", "torch", "triton", "transformers", "ray")


@dataclass(frozen=True)
class Machine:
    """The hardware and versions of a run."""

    processor: str
    num_cores: int
    capability: str
    gpu: str | None
    versions: dict[str, str]

    @property
    def folder(self) -> str:
        """Name of the folder that holds this hardware's results."""
        parts = [self.gpu] if self.gpu else [self.processor, f"{self.num_cores}-cores", self.capability]
        return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")

    def __str__(self) -> str:
        device = f"{self.gpu}, " if self.gpu else ""
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{device}{self.processor}, {self.num_cores} cores, {self.capability}; {packages}"


def this_machine(device: str) -> Machine:
    """Describe the machine that this process runs on; the GPU where that is what is measured."""
    return Machine(
        processor=_processor(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        capability=_capability(),
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        versions=_versions(),
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _capability() -> str:
    """Widest vector unit, with a word on bf16 products, which decide between 1x and 4x in that dtype."""
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.cpu.get_cpu_capability() + (" with bf16" if bf16 else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

"""The name under which times are kept: a table measured on one machine says nothing of another."""

import platform
import re
from functools import cache
from pathlib import Path

import torch


@cache
def hardware_name(device_type: str) -> str:
    """Name of this machine's processor with its widest vector unit, or of its GPU, as a file name.

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: A GPU's name is wanted where torch sees none.
    """
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda': torch sees no CUDA device here; ask where there is one, or for the CPU")
        words = [torch.cuda.get_device_name()]
    else:
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        words = [_processor(), torch.backends.cpu.get_cpu_capability(), "bf16" if bf16 else ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()

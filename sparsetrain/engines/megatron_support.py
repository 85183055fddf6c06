"""Whether Megatron-Core can run here, and its process groups; importing this file does not import Megatron."""

import warnings
from importlib import metadata

import torch

from sparsetrain.config import RunConfig
from sparsetrain.errors import ConfigError

TESTED_VERSIONS = (0, 16), (0, 17)
"""Lowest version of Megatron-Core, and the first one beyond those that are tested."""


def require_megatron(config: RunConfig) -> None:
    """Make sure that a run with parallel.engine=megatron can start, without importing Megatron.

    Raises:
        ConfigError: It is not installed, is of a version that has not been tested, or the run has no GPUs.
    """
    if config.parallel.engine != "megatron":
        return
    where = "parallel.engine = megatron"
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{where}: Megatron-Core is not installed. pip install 'sparsetrain[megatron]', or set "
            "parallel.engine=torch"
        ) from None
    lowest, beyond = TESTED_VERSIONS
    if not lowest <= _numbers(version) < beyond:
        shown = [".".join(map(str, bound)) for bound in TESTED_VERSIONS]
        raise ConfigError(
            f"{where}: version {version} of Megatron-Core is installed, and {shown[0]} up to, not including, "
            f"{shown[1]} are tested. pip install 'megatron-core>={shown[0]},<{shown[1]}', or set parallel.engine=torch"
        )
    if config.cluster.gpus_per_worker == 0 and _device_of_megatron() != "cpu":
        raise ConfigError(
            f"{where}: Megatron-Core needs a GPU for each worker, and cluster.gpus_per_worker = 0. Set it to 1; "
            "on the CPU train with parallel.engine=torch or deepspeed"
        )


def keep_megatron_quiet() -> None:
    """Let it not say, on every rank, that it goes without Transformer Engine and apex; `doctor` reports them."""
    warnings.filterwarnings("ignore", module=r"megatron\.", category=UserWarning)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _device_of_megatron() -> str | None:
    """The type of the device on which Megatron makes its tensors: torch's current one; None where there is none."""
    try:
        current: int | torch.device = torch.cuda.current_device()
    except (AssertionError, RuntimeError):  # torch without CUDA; CUDA without a GPU
        return None
    return current.type if isinstance(current, torch.device) else "cuda"

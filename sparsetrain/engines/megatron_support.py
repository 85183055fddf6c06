"""Whether Megatron-Core can run here; importing this file does not import Megatron."""

import warnings

import torch

from sparsetrain.config import RunConfig
from sparsetrain.engines.library import EngineLibrary
from sparsetrain.errors import ConfigError

_MEGATRON = EngineLibrary(
    engine="megatron",
    name="Megatron-Core",
    package="megatron-core",
    installation="pip install 'sparsetrain[megatron]'",
    lowest=(0, 16),
    beyond=(0, 17),
)


def require_megatron(config: RunConfig) -> None:
    """Make sure that a run with parallel.engine=megatron can start, without importing Megatron.

    Raises:
        ConfigError: It is not installed, is of a version that has not been tested, or the run has no GPUs.
    """
    if config.parallel.engine != "megatron":
        return
    _MEGATRON.require()
    if config.cluster.gpus_per_worker == 0 and _device_of_megatron() != "cpu":
        raise ConfigError(
            "parallel.engine = megatron: Megatron-Core needs a GPU for each worker, and cluster.gpus_per_worker = 0. "
            "Set it to 1; on the CPU train with parallel.engine=torch or deepspeed"
        )


def keep_megatron_quiet() -> None:
    """Let it not say, on every rank, that it goes without Transformer Engine and apex; `doctor` reports them."""
    warnings.filterwarnings("ignore", module=r"megatron\.", category=UserWarning)


def _device_of_megatron() -> str | None:
    """The type of the device on which Megatron makes its tensors: torch's current one; None where there is none."""
    try:
        current: int | torch.device = torch.cuda.current_device()
    except (AssertionError, RuntimeError):  # torch without CUDA; CUDA without a GPU
        return None
    return current.type if isinstance(current, torch.device) else "cuda"

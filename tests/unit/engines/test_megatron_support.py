"""What keeps a run from starting on Megatron, told without importing it."""

from importlib import metadata
from typing import Any

import pytest
import torch

from sparsetrain.config import RunConfig
from sparsetrain.engines import require_megatron
from sparsetrain.errors import ConfigError
from sparsetrain.training import preflight


def run(engine: str = "megatron", gpus: int = 1) -> RunConfig:
    values: dict[str, Any] = {
        "name": "megatron",
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24},
        "data": {"seq_len": 16},
        "train": {"tokens": 1024, "batch_tokens": 64},
        "parallel": {"engine": engine},
        "cluster": {"gpus_per_worker": gpus},
    }
    return RunConfig(**values)


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def answer(package: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", answer)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)

    with pytest.raises(ConfigError, match=r"parallel\.engine.*sparsetrain\[megatron\]"):
        require_megatron(run())
    require_megatron(run("torch"))


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "1.0"])
def test_a_version_that_is_not_tested_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, version)

    with pytest.raises(ConfigError, match=rf"version {version} .*'megatron-core>=0\.16,<0\.17'"):
        require_megatron(run())


def test_a_run_without_gpus_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.16.1")

    with pytest.raises(ConfigError, match=r"needs a GPU.*cluster\.gpus_per_worker = 0.*parallel\.engine=torch"):
        preflight(run(gpus=0))
    require_megatron(run(gpus=1))  # wherever that is asked: workers have them


@pytest.mark.parametrize(("current", "is_refused"), [(0, True), (torch.device("cpu"), False)], ids=["gpu", "patched"])
def test_what_torch_takes_for_its_device_decides(
    monkeypatch: pytest.MonkeyPatch, current: Any, is_refused: bool
) -> None:
    installed(monkeypatch, "0.16.1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    if is_refused:
        with pytest.raises(ConfigError, match="needs a GPU"):
            require_megatron(run(gpus=0))
    else:
        require_megatron(run(gpus=0))

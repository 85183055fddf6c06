"""Paths of a config, made absolute on the driver: workers run in other directories than the person who typed them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.config import DataConfig, RunConfig
from sparsetrain.config.data import HuggingFace, JsonLines, MegatronShards, Source, TextFiles, TokenizerFile

JOB_OUTPUT_ROOT = "SPARSETRAIN_OUTPUT_ROOT"
"""Environment variable: where relative outputs of a Ray job go; default ~/sparsetrain."""

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server, and by nothing else, for the command that a job runs."""


def in_ray_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the command of a `ray job submit`."""
    return _JOB_CONFIG in environ


def job_output_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Where relative outputs of a Ray job go: its working directory is a copy that vanishes with the job."""
    return Path(environ.get(JOB_OUTPUT_ROOT) or "~/sparsetrain").expanduser().absolute()


def absolute_paths(config: RunConfig, base: Path, *, output_root: Path | None = None) -> RunConfig:
    """Return the same run with every path absolute.

    Args:
        config: The run.
        base: Folder that relative paths are relative to.
        output_root: Folder for what the run writes (output, data cache) when it differs from `base`. A relative
            `train.init_from` is looked for in `base` first, then here.
    """
    output_root = output_root or base
    train = config.train
    phases = tuple(
        phase.model_copy(update={"data": _absolute_data(phase.data, base, output_root)}) for phase in train.phases
    )
    update: dict[str, Any] = {"phases": phases}
    if train.init_from is not None:
        here = _absolute(train.init_from, base)
        update["init_from"] = here if Path(here).exists() else _absolute(train.init_from, output_root)
    return config.model_copy(
        update={
            "output": _absolute(config.output, output_root),
            "data": _absolute_data(config.data, base, output_root),
            "train": train.model_copy(update=update),
        }
    )


def _absolute(path: str, base: Path) -> str:
    """Join without resolving links or `..`: the text that a person typed stays recognisable, globs stay globs."""
    return os.path.normpath(base / Path(path).expanduser())


def _absolute_data(data: DataConfig, base: Path, output_root: Path) -> DataConfig:
    update: dict[str, Any] = {
        "source": tuple(_absolute_source(source, base) for source in data.source),
        "cache": _absolute(data.cache, output_root),
    }
    if isinstance(data.tokenizer, TokenizerFile):
        update["tokenizer"] = data.tokenizer.model_copy(update={"path": _absolute(data.tokenizer.path, base)})
    return data.model_copy(update=update)


def _absolute_source(source: Source, base: Path) -> Source:
    match source:
        case TextFiles() | JsonLines():
            return source.model_copy(update={"paths": tuple(_absolute(path, base) for path in source.paths)})
        case MegatronShards():
            return source.model_copy(update={"prefixes": tuple(_absolute(path, base) for path in source.prefixes)})
        case HuggingFace() if Path(_absolute(source.name, base)).is_dir():
            return source.model_copy(update={"name": _absolute(source.name, base)})
    return source

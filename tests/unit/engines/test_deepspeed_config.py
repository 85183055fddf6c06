"""DeepSpeed's generated config, and what is refused before DeepSpeed is imported."""

from importlib import metadata
from typing import Any

import pytest

from sparsetrain.config import RunConfig, check_config
from sparsetrain.engines.deepspeed_config import deepspeed_config, require_deepspeed
from sparsetrain.errors import ConfigError
from sparsetrain.training import preflight


def run(overrides: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        name="ds",
        model={"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24},
        data={"seq_len": 16},
        train={"tokens": 1024, "batch_tokens": 64, "micro_batch_size": 3, **train},
        parallel={"engine": "deepspeed", "zero": 2} if parallel is None else parallel,
        engine_overrides={"deepspeed": overrides or {}},
    )


def test_the_config_follows_the_run_and_takes_overrides_in() -> None:
    config = deepspeed_config(run({"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}))

    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "parallel.zero"),
        ({"gradient_clipping": 1.0}, "optimizer.grad_clip"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"train_batch_size": 8}, "train.batch_tokens"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "CPU alone"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"zero_optimization": {"cpu_offload": True}}, "offload_optimizer"),
        ({"tensor_parallel": {"autotp_size": 2}}, "parallel.engine=megatron"),
        ({"elasticity": {"enabled": True}}, "cluster.min_workers"),
        ({"compression_training": {"sparse_pruning": {}}}, "sparsity rules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_override_that_contradicts_the_run_is_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=r"engine_overrides\.deepspeed\.") as caught:
        deepspeed_config(run(overrides))
    assert named in str(caught.value)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}


def test_the_optimizer_can_be_offloaded_to_the_host() -> None:
    assert deepspeed_config(run(OFFLOAD))["zero_optimization"] == {"stage": 2, **OFFLOAD["zero_optimization"]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel": {"engine": "deepspeed", "zero": 0}}, "parallel.zero"),
        ({"parallel": {"engine": "deepspeed", "experts": "ep"}}, "parallel.experts"),
        ({"sparsity": [{"params": "*", "method": "ste", "pattern": "2:4"}]}, "method=static or prune"),
    ],
    ids=["stage 0", "experts", "recipe"],
)
def test_what_cannot_be_offloaded_is_named(changes: dict[str, Any], named: str) -> None:
    changed = RunConfig.model_validate(run(OFFLOAD).model_dump() | changes)
    with pytest.raises(ConfigError, match=r"offload_optimizer") as caught:
        deepspeed_config(changed)
    assert named in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"sparsetrain\[deepspeed\]"):
        require_deepspeed(run())
    with pytest.raises(ConfigError, match=r"sparsetrain\[deepspeed\]"):
        preflight(run())  # before any text is read, or worker started
    require_deepspeed(run(parallel={}))  # which needs none


@pytest.mark.parametrize(
    ("version", "is_tested"), [("0.18.9", False), ("0.19.0", True), ("0.19.8+x", True), ("0.20.0", False)]
)
def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, is_tested: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if is_tested:
        require_deepspeed(run())
    else:
        with pytest.raises(ConfigError, match=f"version {version}"):
            require_deepspeed(run())


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"zero": 2}, "parallel.zero"),
        ({"engine": "deepspeed", "shard": "full"}, "parallel.shard"),
        ({"engine": "deepspeed", "zero": 4}, "parallel.zero"),
        ({"engine": "horovod"}, "parallel.engine"),
    ],
    ids=["zero on torch", "full on deepspeed", "stage 4", "another engine"],
)
def test_layouts_that_an_engine_cannot_do_are_refused(parallel: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run(parallel=parallel)


def test_compile_and_overrides_belong_to_one_engine_each() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile"):
        check_config(run(compile=True))
    with pytest.raises(ConfigError, match=r"engine_overrides\.deepspeed"):
        check_config(run({"wall_clock_breakdown": True}, parallel={}))
    check_config(run({"wall_clock_breakdown": True}))

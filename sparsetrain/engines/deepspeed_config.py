"""DeepSpeed's own config, generated from ours; and what can be found wrong without importing DeepSpeed."""

from collections.abc import Iterator, Mapping
from typing import Any

from sparsetrain.config import RunConfig
from sparsetrain.engines.library import EngineLibrary
from sparsetrain.errors import ConfigError

_DEEPSPEED = EngineLibrary(
    engine="deepspeed",
    name="DeepSpeed",
    package="deepspeed",
    installation="DS_BUILD_OPS=0 pip install 'sparsetrain[deepspeed]'",
    # The partitions are read from attributes that may change with any other release.
    lowest=(0, 19),
    beyond=(0, 20),
)

_OURS = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "seed": "seed",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "elasticity": "cluster.min_workers",
}
"""Keys of DeepSpeed's that this file says already, and where."""

_CANNOT = {
    "zero_optimization.offload_param": "the forward pass reads weights where it computes",
    "zero_optimization.cpu_offload": "it is an old name; write zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_params": "the forward pass reads weights where it computes",
    "zero_optimization.zero_hpz_partition_size": "masks know of one partition of a weight",
    "zero_optimization.mics_shard_size": "masks know of one partition of a weight",
    "zero_optimization.zero_quantized_weights": "a zeroed weight would not stay exactly zero",
    "zero_optimization.parameter_alignment": "masks know of partitions without gaps",
    "zero_optimization.zenflow": "it updates weights at other times than the masks",
    "tensor_parallel": "it shards data alone; parallel.engine=megatron cuts matrices",
    "sequence_parallel_size": "it shards data alone; parallel.engine=megatron cuts sequences",
    "progressive_layer_drop": "the model's layers are those of model",
    "compression_training": "sparsity rules own the zeros of a run",
    "sparse_attention": "DeepSpeed has removed it; set model.attention",
}
"""Keys of DeepSpeed's that break what the engine promises, and why."""

_OFFLOAD = "zero_optimization.offload_optimizer"


def offloads_optimizer(config: RunConfig) -> bool:
    """Whether weights are optimised in the host's memory, by engine_overrides.deepspeed."""
    offload = config.engine_overrides.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: the run's settings, and engine_overrides.deepspeed merged into them.

    Clipping, precision and accumulation are done by the engine in the same way as without DeepSpeed, so they are off.

    Raises:
        ConfigError: An override contradicts the run's settings, or asks for what the engine cannot do.
    """
    overrides = config.engine_overrides.deepspeed
    for key, value in _leaves(overrides):
        _refuse(key, value)
    if offloads_optimizer(config):
        _check_offload(config)
    generated = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    return _merge(generated, overrides)


def require_deepspeed(config: RunConfig) -> None:
    """Make sure that a run with parallel.engine=deepspeed can start, without importing DeepSpeed.

    Raises:
        ConfigError: It is not installed, is of a version that has not been tested, or its overrides are wrong.
    """
    if config.parallel.engine != "deepspeed":
        return
    deepspeed_config(config)
    _DEEPSPEED.require()


def _refuse(key: str, value: Any) -> None:
    where = f"engine_overrides.deepspeed.{key} = {value}"
    for theirs, ours in _OURS.items():
        if _is_inside(key, theirs):
            raise ConfigError(f"{where}: this is {ours} of a run's own settings; set that, and remove the override")
    for theirs, reason in _CANNOT.items():
        if _is_inside(key, theirs):
            raise ConfigError(f"{where}: not with this engine: {reason}; remove it")


def _check_offload(config: RunConfig) -> None:
    """Weights in the host's memory are optimised by ZeRO 1 to 3, where nothing else keeps some on the device."""
    where = f"engine_overrides.deepspeed.{_OFFLOAD}"
    settings = config.engine_overrides.deepspeed["zero_optimization"]["offload_optimizer"]
    if settings["device"] != "cpu":
        raise ConfigError(f"{where}.device = {settings['device']}: this engine offloads to the CPU alone; write cpu")
    for key in settings.keys() - {"device", "pin_memory"}:
        raise ConfigError(
            f"{where}.{key} = {settings[key]}: of this section device and pin_memory are taken; remove it"
        )
    if config.parallel.zero_stage == 0:
        raise ConfigError(f"{where}: stage 0 keeps all on the device; set parallel.zero to 1, 2 or 3, or remove it")
    if config.parallel.experts is not None:
        raise ConfigError(
            f"{where}: parallel.experts = {config.parallel.experts} keeps experts, which ZeRO does not see, on the "
            "device; remove one of the two"
        )
    if any(rule.is_recipe for phase in config.phases if phase.sparsity != "keep" for rule in phase.sparsity):
        raise ConfigError(f"{where}: recipes choose masks where the forward pass computes; use method=static or prune")


def _is_inside(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _merge(base: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in override.items():
        inside = base.get(key)
        merged[key] = _merge(inside, value) if isinstance(inside, dict) and isinstance(value, Mapping) else value
    return merged

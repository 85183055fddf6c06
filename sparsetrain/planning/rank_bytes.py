"""What a rank holds of a model: weights, gradients and optimizer state in bytes, by how a run is laid over ranks.

Everything is float32, whatever the precision of matrix products; AdamW keeps two numbers for each weight. Activations
and what a collective gathers for a moment are not in here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from sparsetrain.config import ParallelConfig, RunConfig
from sparsetrain.planning.tensor_parallel import cut_dim

_ITEMSIZE = 4
_MOMENTS = 2
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class RankBytes:
    """Bytes on the rank that holds most."""

    weights: int
    """With ZeRO above stage 0 also its copy of them that is optimised."""
    gradients: int
    """Before they are reduced over ranks, where that makes them fewer."""
    optimizer: int
    """Adam's moments."""

    def __add__(self, other: "RankBytes") -> "RankBytes":
        return RankBytes(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def mesh_of(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Sizes of the mesh by name, data parallelism first; what is not split is left out.

    Args:
        parallel: The run's layout.
        world_size: Number of ranks, which the sizes divide.
    """
    split = {"tensor": parallel.tp, "pipeline": parallel.pp, "context": parallel.cp}
    mesh = {"data": world_size // prod(split.values())}
    mesh |= {name: size for name, size in split.items() if size > 1}
    if parallel.shard == "full":
        size = parallel.shard_size or world_size
        mesh = {"replicate": world_size // size, "shard": size}
    if parallel.experts is not None:
        mesh["expert"] = parallel.ep or world_size // parallel.pp
    return mesh


def rank_bytes(config: RunConfig, world_size: int, shapes: Mapping[str, tuple[int, ...]]) -> RankBytes:
    """Count what a rank holds between a backward pass and the optimizer's step.

    Args:
        config: The run.
        world_size: Number of ranks, as `check_world` allows.
        shapes: Of every weight of the model by name, from `weight_shapes`.
    """
    stages = config.parallel.pp
    held = [_held_by_stage(config, world_size // stages, shapes, stage) for stage in range(stages)]
    return max(held, key=lambda bytes_: bytes_.total)


def _held_by_stage(config: RunConfig, ranks: int, shapes: Mapping[str, tuple[int, ...]], stage: int) -> RankBytes:
    """What a rank holds of a pipeline stage that `ranks` share."""
    parallel = config.parallel
    here = {name: shape for name, shape in shapes.items() if _stage_of(name, config) == stage}
    spread = {name for name in here if parallel.experts is not None and ".experts." in name}
    others = {name: shape for name, shape in here.items() if name not in spread}
    experts = _experts(config, ranks, {name: here[name] for name in spread}) if spread else RankBytes(0, 0, 0)
    if parallel.engine == "deepspeed":
        return experts + _zero(parallel.zero_stage, ranks, sum(map(prod, others.values())))
    if parallel.shard == "full":
        parts = parallel.shard_size or ranks
        return experts + _replicated(sum(_largest_part(shape, parts) for shape in others.values()))
    cuts = {name: parallel.tp if cut_dim(name) is not None else 1 for name in others}
    numel = sum(prod(shape) // cuts[name] for name, shape in others.items())
    copies = ranks // parallel.tp if parallel.engine == "megatron" and parallel.zero_stage == 1 else 1
    return experts + RankBytes(_ITEMSIZE * numel, _ITEMSIZE * numel, _MOMENTS * _ITEMSIZE * -(-numel // copies))


def _stage_of(name: str, config: RunConfig) -> int:
    """The pipeline stage that a weight is on: layers in equal parts, embeddings before them, norm and head after."""
    layer = _LAYER.match(name)
    if layer is None:
        return 0 if name.startswith(("embed.", "positions.")) else config.parallel.pp - 1
    return int(layer[1]) * config.parallel.pp // config.model.num_layers


def _replicated(numel: int) -> RankBytes:
    return RankBytes(_ITEMSIZE * numel, _ITEMSIZE * numel, _MOMENTS * _ITEMSIZE * numel)


def _largest_part(shape: tuple[int, ...], parts: int) -> int:
    """Elements of the first of `parts` chunks of the first dimension."""
    return -(-shape[0] // parts) * prod(shape[1:])


def _zero(stage: int, world_size: int, numel: int) -> RankBytes:
    """What DeepSpeed's ZeRO keeps; it pads a partition by a few elements more."""
    part = -(-numel // world_size)
    if stage == 0:
        return _replicated(numel)
    weights = part if stage >= 3 else numel
    gradients = part if stage >= 2 else numel
    return RankBytes(_ITEMSIZE * (weights + part), _ITEMSIZE * gradients, _MOMENTS * _ITEMSIZE * part)


def _experts(config: RunConfig, ranks: int, shapes: Mapping[str, tuple[int, ...]]) -> RankBytes:
    """Those that a rank owns, of all layers of its stage together."""
    assert config.model.moe is not None
    num_layers = len({_LAYER.match(name)[1] for name in shapes})  # type: ignore[index]
    num_experts = num_layers * config.model.moe.num_experts
    numel = sum(map(prod, shapes.values()))
    return _replicated(-(-num_experts // (config.parallel.ep or ranks)) * (numel // num_experts))

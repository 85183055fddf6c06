"""Bytes that a rank holds, from a YAML alone; that they are those of a real rank is tested where there are ranks."""

from typing import Any

import pytest
import torch

from sparsetrain.config import RunConfig
from sparsetrain.models import Transformer
from sparsetrain.planning.rank_bytes import RankBytes, mesh_of, rank_bytes
from sparsetrain.sharding import weight_shapes

MODEL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64}
MOE = {"num_experts": 8, "top_k": 2, "ffn_dim": 48}
EXPERT = 3 * 32 * 48


def run(parallel: dict[str, Any], moe: dict[str, Any] | None = None) -> RunConfig:
    return RunConfig(
        name="bytes",
        model=MODEL if moe is None else MODEL | {"moe": moe},
        data={"seq_len": 16},
        train={"tokens": 1024, "batch_tokens": 128},
        parallel=parallel,
    )


def held(config: RunConfig, world_size: int) -> RankBytes:
    with torch.device("meta"):
        model = Transformer(config.model, 64, 16)
    return rank_bytes(config, world_size, weight_shapes(model))


NUMEL = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 2 * 64 * 32 + 32
QUARTER = -(-NUMEL // 4)


@pytest.mark.parametrize(
    ("parallel", "wanted"),
    [
        ({}, (NUMEL, NUMEL, 2 * NUMEL)),
        ({"shard": "full"}, (QUARTER, QUARTER, 2 * QUARTER)),
        ({"engine": "deepspeed", "zero": 0}, (NUMEL, NUMEL, 2 * NUMEL)),
        ({"engine": "deepspeed", "zero": 1}, (NUMEL + QUARTER, NUMEL, 2 * QUARTER)),
        ({"engine": "deepspeed", "zero": 2}, (NUMEL + QUARTER, QUARTER, 2 * QUARTER)),
        ({"engine": "deepspeed", "zero": 3}, (2 * QUARTER, QUARTER, 2 * QUARTER)),
        ({"engine": "megatron", "zero": 1}, (NUMEL, NUMEL, 2 * QUARTER)),
    ],
    ids=["ddp", "full", "zero-0", "zero-1", "zero-2", "zero-3", "megatron-zero-1"],
)
def test_every_layout_shards_what_it_says(parallel: dict[str, Any], wanted: tuple[int, int, int]) -> None:
    found = held(run(parallel), 4)

    assert (found.weights, found.gradients, found.optimizer) == tuple(4 * numel for numel in wanted)
    assert found.total == 4 * sum(wanted)


@pytest.mark.parametrize("parallel", [{}, {"shard": "full"}, {"engine": "deepspeed", "zero": 3}])
def test_spread_experts_are_divided_by_their_ranks_whatever_shards_the_rest(parallel: dict[str, Any]) -> None:
    def beside(ranks: int) -> int:
        return held(run(parallel | {"experts": "ep", "ep": ranks}, MOE), 4).total

    assert beside(2) - beside(4) == 2 * (4 - 2) * EXPERT * 16


@pytest.mark.parametrize(
    ("parallel", "mesh"),
    [
        ({}, {"data": 8}),
        ({"shard": "full", "shard_size": 4}, {"replicate": 2, "shard": 4}),
        ({"experts": "fssdp", "ep": 2}, {"data": 8, "expert": 2}),
        ({"shard": "full", "experts": "ep"}, {"replicate": 1, "shard": 8, "expert": 8}),
        (
            {"engine": "megatron", "tp": 2, "pp": 2, "experts": "ep"},
            {"data": 2, "tensor": 2, "pipeline": 2, "expert": 4},
        ),
    ],
    ids=["ddp", "hybrid", "expert groups", "experts over all", "megatron"],
)
def test_the_mesh_names_what_is_split(parallel: dict[str, Any], mesh: dict[str, int]) -> None:
    assert mesh_of(run(parallel).parallel, 8) == mesh


def test_pipeline_stages_hold_their_layers_and_tensor_parallel_ranks_their_part_of_matrices() -> None:
    config = run({"engine": "megatron", "tp": 2, "pp": 2})
    layer = (4 * 32 * 32 + 3 * 32 * 64) // 2 + 2 * 32
    assert held(config, 4).weights == 4 * (layer + 64 * 32 // 2 + 32)  # of the last, which has head and norm


def test_experts_of_a_stage_are_divided_by_its_ranks() -> None:
    config = run({"engine": "megatron", "tp": 2, "sp": True, "pp": 2, "experts": "ep"}, MOE)
    without = run({"engine": "megatron", "tp": 2, "sp": True, "pp": 2}, MOE)
    assert held(without, 8).total - held(config, 8).total == (8 - 8 // 4) * EXPERT * 16

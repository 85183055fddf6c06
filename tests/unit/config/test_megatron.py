"""Layouts that Megatron cannot do, and keys that only Megatron knows."""

from typing import Any

import pytest

from sparsetrain.config import RunConfig, check_config, check_world
from sparsetrain.errors import ConfigError

MOE = {"num_experts": 4}


def run(parallel: dict[str, Any], seq_len: int = 16, **model: Any) -> RunConfig:
    sizes = {"dim": 32, "num_layers": 4, "num_heads": 4, "ffn_dim": 48}
    values: dict[str, Any] = {
        "name": "megatron",
        "model": sizes | model,
        "data": {"seq_len": seq_len},
        "train": {"tokens": 4096, "batch_tokens": 8 * seq_len},
        "parallel": {"engine": "megatron"} | parallel,
    }
    return RunConfig(**values)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("key", ["tp", "pp", "cp", "sp"])
def test_other_engines_name_the_one_that_cuts_the_model(engine: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.{key}.*{engine} cannot.*engine: megatron"):
        run({"engine": engine, key: True if key == "sp" else 2})


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"shard": "full"}, r"parallel\.shard.*engine: torch"),
        ({"zero": 2}, r"parallel\.zero.*write one of these"),
        ({"sp": True}, r"parallel\.sp.*larger tp"),
        ({"tp": 0}, r"parallel\.tp"),
    ],
)
def test_sections_refuse_what_has_no_meaning(parallel: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(parallel)


@pytest.mark.parametrize(
    ("parallel", "model", "expected"),
    [
        ({"pp": 8}, {}, r"parallel\.pp = 8.*the model has 4"),
        ({"pp": 3}, {}, r"parallel\.pp = 3.*equally many layers; 2 and 4 do"),
        ({"pp": 2}, {"tie_embeddings": True}, r"model\.tie_embeddings.*first stage.*pp: 1"),
        ({"pp": 2}, {"arch": "gpt2"}, r"model\.tie_embeddings"),
        ({"tp": 3}, {}, r"parallel\.tp = 3.*model\.num_heads=4; 2 and 4 do"),
        ({"tp": 4}, {"num_kv_heads": 2}, r"parallel\.tp = 4.*model\.num_kv_heads=2; 2 does"),
        ({"tp": 2, "cp": 4}, {}, r"parallel\.cp = 4.*tp·cp = 2·4.*num_heads=4"),
        ({"tp": 4}, {"ffn_dim": 30}, r"parallel\.tp = 4.*ffn_dim=30"),
        ({"tp": 2}, {"vocab_size": 301}, r"parallel\.tp = 2.*vocab_size=301"),
        ({"tp": 2}, {"moe": MOE}, r"parallel\.sp.*each its own"),
        ({}, {"moe": MOE | {"router": "hash"}}, r"model\.moe\.router.*token ids"),
        ({"tp": 2, "sp": True}, {"moe": MOE | {"aux_scope": "sequence"}}, r"aux_scope.*micro_batch"),
        ({"cp": 2}, {"moe": MOE | {"aux_scope": "sequence"}}, r"aux_scope.*micro_batch"),
    ],
)
def test_a_model_that_megatron_cannot_cut_is_told_with_a_fix(
    parallel: dict[str, Any], model: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        check_config(run(parallel, **model))


def test_the_vocabulary_that_is_padded_is_cut_evenly_too() -> None:
    with pytest.raises(ConfigError, match=r"(?s)parallel\.tp = 3.*multiple of 64.*model\.vocab_size"):
        check_config(run({"tp": 3}, dim=36, num_heads=6, ffn_dim=48))


@pytest.mark.parametrize(
    ("parallel", "step"), [({"cp": 4}, r"4 ranks \(cp\)"), ({"cp": 2, "tp": 2, "sp": True}, r"4 ranks \(cp·tp")]
)
def test_samples_that_cannot_be_cut_evenly_are_told(parallel: dict[str, Any], step: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)data\.seq_len = 18.*{step}.*multiple of 4"):
        check_config(run(parallel, seq_len=18))


def test_compiling_is_refused() -> None:
    config = run({})
    with pytest.raises(ConfigError, match=r"train\.compile.*engine=torch only"):
        check_config(config.model_copy(update={"train": config.train.model_copy(update={"compile": True})}))


@pytest.mark.parametrize(
    "parallel",
    [
        {"tp": 4, "pp": 4},
        {"tp": 2, "cp": 2, "pp": 2, "sp": True},
        {"pp": 2, "experts": "fssdp", "ep": 2},
        {"tp": 2, "sp": True, "experts": "ep"},
    ],
)
def test_layouts_that_fit_pass(parallel: dict[str, Any]) -> None:
    config = run(parallel, moe=MOE if "experts" in parallel else None)
    check_config(config)
    check_world(config, 16 if "experts" not in parallel else 4)


def test_ranks_must_hold_whole_copies_of_the_model() -> None:
    config = run({"tp": 2, "pp": 4})
    with pytest.raises(ConfigError, match=r"(?s)parallel\.pp = 4.*tp·pp·cp = 2·4·1 = 8 ranks, and 12"):
        check_world(config, 12)
    check_world(config, 16)


def test_copies_of_the_model_share_the_batch() -> None:
    check_world(run({"tp": 2, "pp": 4}), 64)  # 8 samples, 8 copies
    with pytest.raises(ConfigError, match=r"(?s)train\.batch_tokens.*8 samples.*16 copies of the model"):
        check_world(run({"tp": 2, "pp": 4}), 128)


def test_experts_are_spread_within_a_stage() -> None:
    with pytest.raises(ConfigError, match=r"(?s)parallel\.ep = 4.*number of ranks.*2"):
        check_world(run({"pp": 4, "experts": "ep", "ep": 4}, moe=MOE), 8)

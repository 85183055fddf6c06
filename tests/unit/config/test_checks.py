"""Sections that do not fit each other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetrain.config import check_config, check_world, dump_config, load_config
from sparsetrain.errors import ConfigError

Mistakes = Callable[..., list[str]]

RUN = """\
name: tiny
model: {dim: 8, num_layers: 1, num_heads: 2}
data: {seq_len: 256}
train:
  tokens: 4Ki
  batch_tokens: 2Ki
  phases: [{name: second, tokens: 1Ki}]
"""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_tokens=1000", "must be a multiple of data.seq_len=256; 768 or 1024 would do"),
        ("train.batch_tokens=100", "must be a multiple of data.seq_len=256; 256 would do"),
        ("train.batch_ramp.start_tokens=128", "must be a multiple of data.seq_len=256; 256 would do"),
        (
            "train.phases.0.data.seq_len=192",
            "bad.yaml:6: train.batch_tokens = 2Ki: must be a multiple of train.phases.0.data.seq_len=192; "
            "1920 or 2112 would do",
        ),
        (
            "cluster.workers=3",
            "bad.yaml:6: train.batch_tokens = 2Ki: 8 samples of 256 tokens, which 3 ranks cannot share evenly; "
            "1536 or 2304 would do",
        ),
        ("cluster.workers=16", "which 16 ranks cannot share evenly; 4096 would do"),
        (
            "parallel={shard: full, shard_size: 2}",
            "parallel.shard_size = 2: must divide the number of ranks, 1; 1 does",
        ),
        ("train.phases.0.name=pretrain", "train.phase_name has the same name; give each phase its own"),
        ("train.phases.0.data.tokenizer={kind: bpe}", "differs from data.tokenizer, and the model has one vocabulary"),
        (
            "train.phases.0.data.holdout=0.1",
            "train.phases.0.data.holdout=0.1: differs from data.holdout, and every phase holds out the same documents",
        ),
        ("model.vocab_size=256", "the bytes tokenizer has 257 tokens; write at least that, or remove the key"),
        ("cluster.cpus_per_worker=1.5", "above 1 it must be a whole number"),
        ("cluster.gpus_per_worker=2", "a worker drives one GPU: write 1 (or 0 for none), and set cluster.workers"),
    ],
)
def test_sections_that_do_not_fit_are_told_with_a_fix(mistakes: Mistakes, override: str, expected: str) -> None:
    (line,) = mistakes(RUN, override)

    assert expected in line


def test_the_ramp_must_be_shared_by_all_ranks_too(mistakes: Mistakes) -> None:
    (line,) = mistakes(RUN, "train.batch_ramp.start_tokens=256", "cluster.workers=2")

    assert "start_tokens=256: 1 samples" in line
    assert "512 would do" in line


def test_every_number_of_workers_that_may_come_to_be_must_fit(mistakes: Mistakes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    run = load_config(tmp_path / "run.yaml", ["cluster.workers=2", "cluster.min_workers=1"])
    assert list(run.cluster.world_sizes) == [1, 2]
    (line,) = mistakes(RUN, "cluster.workers=4", "cluster.min_workers=2")
    assert "8 samples of 256 tokens, which 3 ranks cannot share evenly" in line
    (line,) = mistakes(RUN, "cluster.workers=2", "cluster.min_workers=3")
    assert line == "override cluster.min_workers=3: must not be above workers=2"


def test_torchrun_decides_the_number_of_ranks(mistakes: Mistakes) -> None:
    (line,) = mistakes(RUN, world_size=3)

    assert "which 3 ranks cannot share evenly" in line


def test_the_config_of_a_run_that_torchrun_trained_loads_whatever_its_number_of_workers(tmp_path: Path) -> None:
    layout = ["parallel={shard: full, shard_size: 4, experts: ep, ep: 2}", "cluster.workers=1"]
    (tmp_path / "run.yaml").write_text(MOE)
    run = load_config(tmp_path / "run.yaml", layout, world_size=4)
    (tmp_path / "config.yaml").write_text(dump_config(run))

    with pytest.raises(ConfigError, match="must divide the number of ranks, 1"):
        load_config(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", was_trained=True) == run


def test_vocabulary_holds_the_trained_tokenizer(mistakes: Mistakes) -> None:
    (line,) = mistakes(RUN, "model.vocab_size=512", "data.tokenizer={kind: bpe, vocab_size: 1024}")

    assert "model.vocab_size=512: the bpe tokenizer has 1024 tokens" in line


def test_a_config_made_in_python_can_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    good = load_config(path)
    train = good.train.model_copy(update={"batch_tokens": 1000})

    check_config(good)
    check_world(good, 4)
    with pytest.raises(ConfigError, match=r"train\.batch_tokens = 1000: must be a multiple"):
        check_config(good.model_copy(update={"train": train}))
    with pytest.raises(ConfigError, match=r"train\.batch_tokens = 2048: .* which 3 ranks cannot share"):
        check_world(good, 3)


MOE = """\
name: tiny
model: {dim: 8, num_layers: 1, num_heads: 2, moe: {num_experts: 4}}
data: {seq_len: 256}
train: {tokens: 4Ki, batch_tokens: 6Ki}
parallel: {experts: fssdp}
cluster: {workers: 4}
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.moe.top_k=5"], "model.moe.top_k=5: a token cannot use more experts than num_experts=4"),
        (["parallel.ep=3"], "parallel.ep=3: must divide the number of ranks, 4; 2 and 4 do"),
        (["cluster.workers=8"], "parallel.ep = null: 8 ranks cannot share the 4 experts of a layer"),
        (["cluster.workers=6", "parallel.ep=6"], "because each owns one at least; 3 would do"),
        (["model.moe=null"], "parallel.experts = fssdp: the model has no experts; add model.moe, or remove this key"),
        (
            ["parallel.experts=null", "parallel.ep=2"],
            "parallel.ep=2: has no meaning without experts; write experts: ep",
        ),
        (
            ["parallel.experts=null", "parallel.fssdp.spare_slots=2"],
            "parallel.fssdp: has no meaning without experts; write experts: fssdp",
        ),
        (
            ["parallel.experts=ep", "parallel.fssdp={dispatch: paper, pipeline: 2, spare_slots: 2}"],
            "parallel.fssdp.spare_slots = 2: has no meaning with experts=ep, which replicates and moves no expert",
        ),
        (["train.upcycle=true"], "train.upcycle=true: needs the dense model to start from; set init_from"),
        (
            ["parallel.experts=null", "model.moe=null", "train.upcycle=true", "train.init_from=runs/dense"],
            "train.upcycle=true: the model has no experts to be made of a dense model; add model.moe",
        ),
        (["parallel.fssdp.pipeline=0"], "parallel.fssdp.pipeline=0: must be above 0"),
        (["parallel.fssdp.pipeline=many"], "parallel.fssdp.pipeline=many: expected auto or a whole number"),
        (["parallel.fssdp.spare_slots=-1"], "parallel.fssdp.spare_slots=-1: must be at least 0"),
    ],
)
def test_experts_that_cannot_be_spread_so_are_told_with_a_fix(
    mistakes: Mistakes, overrides: list[str], expected: str
) -> None:
    (line,) = mistakes(MOE, *overrides)

    assert expected in line


def test_a_resolved_config_of_expert_parallelism_loads_again(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MOE)
    run = load_config(tmp_path / "run.yaml", ["parallel={experts: ep, ep: 2, fssdp: {pipeline: 2}}"], world_size=4)
    (tmp_path / "resolved.yaml").write_text(dump_config(run))

    assert "spare_slots" in (tmp_path / "resolved.yaml").read_text()
    assert load_config(tmp_path / "resolved.yaml") == run


ATTENTION = """\
name: tiny
model:
  dim: 32
  num_layers: 4
  num_heads: 4
  attention: {kind: block_sparse, block: 32, heads: [{kind: local, width: 2}], layers: [1, 3]}
data: {seq_len: 256}
train: {tokens: 4Ki, batch_tokens: 2Ki}
"""
UNION = "model.attention.heads=[{kind: union, of: [{kind: local, width: 2%s}, {kind: %s, width: 1}]}]"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.attention=sparse", "expected one of dense, block_sparse; did you mean block_sparse?"),
        ("model.attention={block: 32, heads: [dense]}", "attention.kind: missing; expected one of dense, block_sparse"),
        ("model.attention.block=40", "model.attention.block=40: must be a multiple of 16"),
        ("model.attention.block=256", "must be below data.seq_len=256, or a sample is one block, which sees itself"),
        ("model.attention.heads=[]", "expected at least 1 value(s), and there are 0"),
        ("model.attention.heads=[{kind: locl, width: 2}]", "heads.0.kind = locl: expected one of dense, local, sink"),
        ("model.attention.heads=[local]", "model.attention.heads.0.width: missing (Blocks, the query's own included)"),
        ("model.attention.heads=[{kind: local, width: 0}]", "model.attention.heads.0.width = 0: must be above 0"),
        (
            "model.attention.heads=[{kind: local, width: 1.5}]",
            "model.attention.heads.0.width = 1.5: expected a whole number",
        ),
        ("model.attention.heads=[{kind: sink, width: true}]", "heads.0.width = true: expected a whole number"),
        ("model.attention.heads=[{kind: sink, width: -1}]", "heads.0.width = -1: must be above 0"),
        ("model.attention.heads=[{kind: strided, stride: 2.0}]", "heads.0.stride = 2.0: expected a whole number"),
        ("model.attention.heads=[{kind: strided, stride: 2, offset: -1}]", "heads.0.offset = -1: must be at least 0"),
        ("model.attention.heads=[{kind: dilated, width: 2, dilation: 0}]", "heads.0.dilation = 0: must be above 0"),
        ("model.attention.heads=[{kind: random, count: true}]", "heads.0.count = true: expected a whole number"),
        ("model.attention.heads=[{kind: random, count: 1, seed: -1}]", "heads.0.seed = -1: must be at least 0"),
        (
            "model.attention.heads=[{kind: random, count: 1, seed: 9223372036854775808}]",
            "must be below 9223372036854775808",
        ),
        ("model.attention.heads=[{kind: local, width: 1, stride: 2}]", "heads.0.stride = 2: unknown key"),
        (UNION % ("", "snk"), "model.attention.heads.0.of.1.kind = snk: expected one of"),
        (UNION % (", num_heads: 2", "sink"), "heads.0.of.0.num_heads: a part of a pattern has no heads of its own"),
        ("model.attention.heads=[dense, dense, dense, dense, dense]", "5 patterns for num_heads=4; remove some"),
        (
            "model.attention.heads=[{kind: dense, num_heads: 1}, {kind: local, width: 1, num_heads: 2}]",
            "num_heads is 1 + 2 in them; must add up to model.num_heads=4",
        ),
        (
            "model.attention.heads=[{kind: dense, num_heads: 1}, {kind: local, width: 1}]",
            "model.attention.heads.1: has no num_heads and another pattern has; write it in all of them, or in none",
        ),
        ("model.attention.layers=[1, 4]", "there is no layer 4; num_layers=4, counted from 0"),
        ("model.attention.layers=[1, 1]", "names a layer twice"),
        ("model.attention.layers={every: 5}", "must not be above num_layers=4: no layer would be sparse"),
        ("model.attention.layers=odd", "model.attention.layers=odd: expected all, {every: k} or a list of layers"),
    ],
)
def test_attention_that_does_not_fit_is_explained(mistakes: Mistakes, override: str, expected: str) -> None:
    (line,) = mistakes(ATTENTION, override)

    assert expected in line

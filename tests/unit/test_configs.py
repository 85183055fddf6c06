"""The runs that come with the project, with their models built on the meta device."""

from pathlib import Path

import pytest
import torch

from sparsetrain.config import BlockSparseAttention, RunConfig, check_world, load_config
from sparsetrain.engines.deepspeed_config import deepspeed_config
from sparsetrain.models import Transformer
from sparsetrain.models.attention_layouts import attention_layout
from sparsetrain.moe import Experts, moe_layers
from sparsetrain.moe.placement import ExpertBytes, own_evenly, owned_bytes
from sparsetrain.planning.flops import parameter_counts
from sparsetrain.sparsity import describe_parameters, match_rules
from sparsetrain.training.attention_check import check_attention
from sparsetrain.training.setup import max_seq_len

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def by_name(name: str) -> RunConfig:
    return load_config(next(path for path in CONFIGS if path.name == name))


def build(config: RunConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model, config.model.vocab_size or 2048, max_seq_len(config))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_fits_its_ranks_and_its_rules_match_weights(path: Path) -> None:
    config = load_config(path)
    check_world(config, config.cluster.workers)
    check_attention(config)
    deepspeed_config(config)
    parameters = describe_parameters(build(config))

    for phase in config.phases:
        if phase.sparsity != "keep":
            assert all(match_rules(phase.sparsity, parameters))


@pytest.mark.parametrize(("name", "biases"), [("moe_ep_tiny.yaml", 4 * 8), ("moe_fssdp_tiny.yaml", 0)])
def test_the_small_mixtures_are_one_model_of_which_a_token_uses_less_than_half(name: str, biases: int) -> None:
    counts = parameter_counts(build(by_name(name)))

    expert = 3 * 256 * 256
    layer = 4 * 256 * 256 + 2 * 256 + 8 * 256 + 8 * expert  # attention, norms, router, experts
    assert counts.total == 4 * layer + 2 * 2048 * 256 + 256 + biases
    assert counts.total - counts.active == 4 * 6 * expert
    assert counts.active < counts.total / 2


def test_a_rule_for_experts_owns_all_their_weights_and_no_router() -> None:
    config = by_name("moe_fssdp_tiny.yaml")
    (mine,) = match_rules(config.sparsity, describe_parameters(build(config)))

    assert sorted(weight.name for weight in mine) == sorted(
        f"layers.{layer}.moe.experts.{expert}.{part}"
        for layer in range(4)
        for expert in range(8)
        for part in ("gate", "up", "down")
    )


def test_mixtral_has_its_published_size_and_fits_the_gpus_that_it_names() -> None:
    config = by_name("moe_fssdp_8x7b.yaml")
    model = build(config)
    counts = parameter_counts(model)
    assert counts.total / 1e9 == pytest.approx(46.7, abs=0.05)
    assert counts.active / 1e9 == pytest.approx(12.9, abs=0.05)

    layers = moe_layers(model)
    experts = layers[0][1].experts
    assert isinstance(experts, Experts)
    assert config.parallel.ep is not None
    owners_LE = own_evenly(len(layers), experts.num_experts, config.parallel.ep)
    with_gradients = ExpertBytes(experts.spec.numel, state_itemsize=4 + 8)
    for rank in range(config.parallel.ep):
        assert owned_bytes(owners_LE, rank, with_gradients) / 1e9 == pytest.approx(90, abs=0.5)


def blocks_seen(config: RunConfig) -> torch.Tensor:
    """Which of the 32 blocks of a sample each sees, bool [heads, 32, 32]."""
    assert isinstance(config.model.attention, BlockSparseAttention)
    num_heads = config.model.num_heads
    seen = attention_layout(config.model.attention, num_heads, max_seq_len(config)).to_mask()
    assert seen.shape[1:] == (32, 32)
    return seen.expand(num_heads, -1, -1)


@pytest.mark.parametrize(
    ("name", "layers", "seen_by_row"),
    [
        ("attention_s2.yaml", (1, 3), lambda row: min(row + 1, 2) + max(row - 1, 0) / 4),
        ("attention_local_sink.yaml", (0, 1, 2, 3), lambda row: min(row + 1, 5)),
        ("attention_documents.yaml", (0, 1, 2, 3), lambda row: (3 * min(row + 1, 8) + row + 1) / 4),
    ],
)
def test_a_block_sees_as_many_as_the_patterns_say(name, layers, seen_by_row) -> None:
    config = by_name(name)
    assert config.model.sparse_attention_layers == layers
    assert blocks_seen(config).sum(-1).float().mean(0).tolist() == [seen_by_row(row) for row in range(32)]


def test_the_heads_of_s2_attention_together_see_the_whole_context_and_none_of_them_half() -> None:
    seen = blocks_seen(by_name("attention_s2.yaml"))
    assert torch.equal(seen.any(0), torch.ones(32, 32, dtype=torch.bool).tril())
    assert (seen.sum((1, 2)) < seen.any(0).sum() / 2).all()


def test_the_heads_of_bigbird_draw_other_blocks_beside_the_same_near_ones() -> None:
    seen = blocks_seen(by_name("attention_bigbird.yaml"))
    shared = seen.all(0).sum(-1)[8:]
    assert (shared >= 3).all()
    assert (shared < 6).all()
    assert (seen.sum(-1) <= 2 + 1 + 3).all()

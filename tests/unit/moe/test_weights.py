"""Experts as weights with names of their own: shards, initial values, sparsity rules, and a model that trains."""

import pytest
import torch
from torch import nn

from sparsetrain.config.model import ModelConfig
from sparsetrain.config.sparsity import Cubic, SparsityRule
from sparsetrain.models import Transformer, initialize_
from sparsetrain.moe import Experts, ExpertSpec, MoELayer, auxiliary_loss, moe_layers
from sparsetrain.sharding import DescribesWeights, global_grad_norm, weight_shapes, weight_shards
from sparsetrain.sparsity import Sparsifier
from sparsetrain.testing import assert_close

VOCAB, SEQ_LEN = 64, 16
LLAMA = ModelConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    ffn_dim=48,
    init_std=0.1,
    moe={"num_experts": 4, "ffn_dim": 24, "layers": [1], "shared_experts": 1},
)
GPT2 = ModelConfig(arch="gpt2", dim=32, num_layers=2, num_heads=2, moe={"num_experts": 3, "layers": {"every": 2}})


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config, VOCAB, SEQ_LEN)
    initialize_(model, config, seed)
    return model


def batch(size: int = 4) -> torch.Tensor:
    return torch.randint(VOCAB, (size, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def test_experts_have_the_names_and_shapes_that_rules_and_checkpoints_use():
    moe = {name: shape for name, shape in weight_shapes(build(LLAMA)).items() if ".moe." in name}
    expected = {"layers.1.moe.router.weight": (4, 32)}
    for expert in range(4):
        expected |= {f"layers.1.moe.experts.{expert}.{part}": (24, 32) for part in ("gate", "up")}
        expected[f"layers.1.moe.experts.{expert}.down"] = (32, 24)
    expected |= {f"layers.1.moe.shared.{part}.weight": (24, 32) for part in ("gate", "up")}
    expected["layers.1.moe.shared.down.weight"] = (32, 24)
    assert moe == expected
    assert list(moe) == list(expected)


def test_gelu_experts_have_biases_of_one_dimension():
    names = weight_shapes(build(GPT2))
    assert names["layers.1.moe.experts.2.up_bias"] == (128,)
    assert names["layers.1.moe.experts.2.down_bias"] == (32,)
    assert "layers.0.ffn.up.weight" in names
    assert not any("gate" in name for name in names)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_shards_are_the_live_weights_gradients_and_moments(config):
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters())
    shards = weight_shards(model, optimizer)
    assert [(shard.name, shard.global_shape) for shard in shards] == list(weight_shapes(model).items())
    assert sum(shard.global_numel for shard in shards) == sum(parameter.numel() for parameter in model.parameters())
    tokens = batch()
    model(tokens, tokens).backward()
    optimizer.step()
    (_, layer), shard = moe_layers(model)[0], next(s for s in shards if s.name == "layers.1.moe.experts.2.up")
    first = layer.experts.spec.ffn_dim if config is LLAMA else 0
    state = optimizer.state[layer.experts.w_in]
    for local, stack in (
        (shard.local_weight(), layer.experts.w_in),
        (shard.local_grad(), layer.experts.w_in.grad),
        (shard.local_moments()["exp_avg"], state["exp_avg"]),
    ):
        assert local.data_ptr() == stack[2, first].data_ptr()
        assert torch.equal(local, stack[2, first : first + layer.experts.spec.ffn_dim])
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert_close(global_grad_norm(shards), norm)


def test_experts_describe_their_weights_themselves():
    assert isinstance(Experts(ExpertSpec(4, 3), 2), DescribesWeights)
    assert not isinstance(MoELayer(4, 3, 2), DescribesWeights)


def test_an_experts_initial_weights_are_a_function_of_seed_and_name():
    first, again, other = (dict(named(build(LLAMA, seed))) for seed in (0, 0, 1))
    more = dict(named(build(LLAMA.model_copy(update={"moe": LLAMA.moe.model_copy(update={"num_experts": 6})}))))
    name = "layers.1.moe.experts.3.up"
    assert torch.equal(first[name], again[name])
    assert torch.equal(first[name], more[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["layers.1.moe.experts.2.up"])


def named(model: nn.Module):
    return ((shard.name, shard.local_weight()) for shard in weight_shards(model))


def test_projections_of_experts_into_the_residual_stream_begin_smaller():
    config = ModelConfig(dim=128, num_layers=8, num_heads=2, init_std=0.05, moe={"num_experts": 2, "shared_experts": 1})
    weights = dict(named(build(config)))
    for name, std in (
        ("layers.3.moe.experts.1.gate", 0.05),
        ("layers.3.moe.experts.1.down", 0.05 / 4),
        ("layers.3.moe.shared.down.weight", 0.05 / 4),
        ("layers.3.moe.router.weight", 0.05),
    ):
        assert weights[name].std().item() == pytest.approx(std, rel=5 * (2 * weights[name].numel()) ** -0.5), name


@pytest.mark.parametrize("router", ["sigmoid_topk", "relu"])
def test_routers_parameters_begin_where_they_should(router):
    config = LLAMA.model_copy(update={"moe": LLAMA.moe.model_copy(update={"router": router_config(router)})})
    weights = dict(named(build(config)))
    if router == "sigmoid_topk":
        assert not weights["layers.1.moe.router.bias"].any()
    else:
        assert weights["layers.1.moe.router.norm.weight"].eq(1).all()


def router_config(kind: str):
    return ModelConfig(dim=8, num_layers=1, num_heads=1, moe={"num_experts": 2, "router": kind}).moe.router


def test_the_meta_device_is_enough_for_shapes_and_filling():
    with torch.device("meta"):
        model = Transformer(LLAMA, VOCAB, SEQ_LEN)
    assert weight_shapes(model) == weight_shapes(build(LLAMA))
    initialize_(model.to_empty(device="cpu"), LLAMA, seed=0)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named(model), named(build(LLAMA)), strict=True))


def test_experts_take_sparsity_rules_like_any_weight():
    model = build(LLAMA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    rule = SparsityRule(
        params="*.experts.*",
        method="prune",
        sparsity=0.75,
        schedule=Cubic(kind="cubic", start=0, end=0.5, every_steps=2),
    )
    sparsifier = Sparsifier([rule], total_steps=12)
    sparsifier.attach(model, optimizer)
    tokens, losses = batch(8), []
    for _ in range(12):
        loss = model(tokens, tokens) / tokens.numel()
        (loss + 0.01 * auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    weights = dict(named(model))
    owned = [name for name in weights if ".experts." in name]
    assert {weight.name for weight in sparsifier.report()} == set(owned)
    for name, weight in weights.items():
        zeros = weight.eq(0).sum().item()
        assert zeros == (round(0.75 * weight.numel()) if name in owned else 0), name


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "expert_choice", "hash", "dense_to_sparse", "relu"])
def test_a_model_learns_with_every_router(router):
    config = LLAMA.model_copy(update={"moe": LLAMA.moe.model_copy(update={"router": router_config(router)})})
    model = build(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens, losses = batch(8), []
    for step in range(8):
        loss = model(tokens, tokens) / tokens.numel()
        (loss + auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _, layer in moe_layers(model):
            load = layer.load.take()
            assert load.num_tokens == tokens.numel()
            layer.router.after_step(load.counts_E)
            layer.router.set_progress((step + 1) / 8)
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]

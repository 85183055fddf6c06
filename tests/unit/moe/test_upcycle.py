import pytest
import torch
from torch import nn

from sparsetrain.config.model import ModelConfig
from sparsetrain.errors import MoeError
from sparsetrain.models import Transformer, initialize_
from sparsetrain.moe import MoELayer
from sparsetrain.moe.feed_forward import FeedForward
from sparsetrain.moe.upcycle import Diversity, dense_source, upcycle_
from sparsetrain.sharding import weight_shapes, weight_shards
from sparsetrain.testing import assert_close

VOCAB, SEQ_LEN = 64, 12
SHAPE = {"dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24, "init_std": 0.2}
ARCHS = pytest.mark.parametrize("arch", ["llama", "gpt2"])


def build(seed: int, **config) -> Transformer:
    shape = ModelConfig(**SHAPE, **config)
    model = Transformer(shape, VOCAB, SEQ_LEN)
    initialize_(model, shape, seed)
    return model.double()


def upcycled(dense: nn.Module, diversity: Diversity | None = None, **config) -> Transformer:
    model = build(seed=7, **config)
    upcycle_(model, dict(dense.named_parameters()).__getitem__, *([diversity] if diversity else []))
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {shard.name: shard.local_weight() for shard in weight_shards(model)}


@ARCHS
@pytest.mark.parametrize(
    "router",
    ["softmax_topk", {"kind": "sigmoid_topk", "scale": 2.5}, "hash"],
    ids=["softmax_topk", "sigmoid_topk-scaled", "hash"],
)
def test_an_upcycled_model_computes_what_the_dense_one_did(arch, router):
    dense = build(0, arch=arch)
    moe = {"num_experts": 5, "top_k": 3, "layers": [0, 2], "router": router, "shared_experts": 2}
    model = upcycled(dense, arch=arch, moe=moe)
    tokens = torch.randint(VOCAB, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    assert_close(model(tokens), dense(tokens))
    assert (build(7, arch=arch, moe=moe)(tokens) - dense(tokens)).abs().max() > 0.1


def test_the_router_stays_as_it_was_and_shared_experts_can_learn():
    moe = {"num_experts": 4, "layers": [1], "shared_experts": 1}
    model, fresh = upcycled(build(0), moe=moe), build(7, moe=moe)
    assert torch.equal(weights(model)["layers.1.moe.router.weight"], weights(fresh)["layers.1.moe.router.weight"])
    tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    model(tokens, tokens).backward()
    shared = model.layers[1].moe.shared
    assert not shared.down.weight.any()
    assert shared.down.weight.grad.any()


def test_every_weight_has_the_source_of_its_place():
    moe = {"num_experts": 2, "layers": [1], "shared_experts": 1}
    sources = {name: dense_source(name) for name in weight_shapes(build(0, arch="gpt2", moe=moe))}
    assert sources["layers.1.moe.experts.1.up"] == "layers.1.ffn.up.weight"
    assert sources["layers.1.moe.experts.0.down_bias"] == "layers.1.ffn.down.bias"
    assert sources["layers.0.ffn.up.weight"] == "layers.0.ffn.up.weight"
    assert sources["layers.1.moe.router.weight"] is None
    assert sources["layers.1.moe.shared.up.weight"] is None
    assert set(sources.values()) - {None} == set(weight_shapes(build(0, arch="gpt2")))


def test_noise_makes_experts_differ_by_so_much_of_their_deviation():
    moe = {"num_experts": 4, "layers": [0]}
    dense = build(0)
    model, again, other = (upcycled(dense, Diversity(noise=0.1, seed=s), moe=moe) for s in (0, 0, 1))
    up, source = weights(model)["layers.0.moe.experts.2.up"], dense.layers[0].ffn.up.weight
    assert (up - source).std().item() == pytest.approx(0.1 * source.std().item(), rel=0.2)
    assert not torch.equal(up, weights(model)["layers.0.moe.experts.1.up"])
    assert torch.equal(up, weights(again)["layers.0.moe.experts.2.up"])
    assert not torch.equal(up, weights(other)["layers.0.moe.experts.2.up"])


def test_masks_zero_other_weights_in_each_expert():
    dense = build(0)
    found = weights(upcycled(dense, Diversity(mask=0.3), moe={"num_experts": 3, "layers": [0]}))
    source = dense.layers[0].ffn.gate.weight
    masks = [found[f"layers.0.moe.experts.{expert}.gate"] != 0 for expert in range(3)]
    for expert, mask in enumerate(masks):
        assert (~mask).sum().item() == round(0.3 * mask.numel())
        assert torch.equal(found[f"layers.0.moe.experts.{expert}.gate"], source * mask)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", False), ("gelu", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_from_a_dense_one_computes_the_same(activation, bias, dtype):
    torch.manual_seed(0)
    ffn = FeedForward(6, 10, activation, bias).to(dtype)
    layer, x = MoELayer.from_dense(ffn, num_experts=4, top_k=3, z_loss=0.1), torch.randn(2, 9, 6, dtype=dtype)
    assert layer.experts.w_in.dtype == dtype
    assert layer.loss_weights.z_loss == 0.1
    assert_close(layer(x), ffn(x))
    weight = ffn.up.weight.detach().clone()
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert torch.equal(ffn.up.weight, weight)  # it was copied


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 4), nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4, bias=False)}), nn.ReLU()],
    ids=["linear", "half-biased", "nothing"],
)
def test_other_networks_cannot_become_experts(module):
    with pytest.raises(MoeError, match="cannot become experts: expected weights gate, up and down"):
        MoELayer.from_dense(module, num_experts=2)


def test_a_dense_model_of_another_size_is_refused():
    moe = {"num_experts": 2, "ffn_dim": 12, "layers": [0]}
    with pytest.raises(MoeError, match=r"experts.0.gate of shape \(12, 16\) cannot start from layers.0.ffn.gate"):
        upcycled(build(0), moe=moe)


@pytest.mark.parametrize(("settings", "message"), [({"noise": -1.0}, "noise = -1.0"), ({"mask": 1.0}, "mask = 1.0")])
def test_impossible_diversity_is_refused(settings, message):
    with pytest.raises(MoeError, match=message):
        Diversity(**settings)

import pytest
import torch

from sparsetrain.config.model import ModelConfig
from sparsetrain.models import Transformer, initialize_

CONFIG = ModelConfig(arch="gpt2", dim=128, num_layers=8, num_heads=2, init_std=0.05)


def build(seed: int, config: ModelConfig = CONFIG, vocab_size: int = 256) -> dict[str, torch.Tensor]:
    model = Transformer(config, vocab_size, 32)
    initialize_(model, config, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embed.weight", 0.05),
        ("positions.weight", 0.05),
        ("layers.3.attention.q.weight", 0.05),
        ("layers.3.ffn.up.weight", 0.05),
        ("layers.3.attention.o.weight", 0.05 / 4),
        ("layers.3.ffn.down.weight", 0.05 / 4),
    ],
)
def test_matrices_are_normal_with_the_documented_deviation(name, std):
    weight = build(0)[name]
    assert weight.mean().abs() < 5 * std / weight.numel() ** 0.5
    assert weight.std().item() == pytest.approx(std, rel=5 * (2 * weight.numel()) ** -0.5)


def test_norms_are_one_and_biases_zero():
    for name, parameter in build(0).items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert parameter.eq(1.0).all(), name


def test_a_weight_depends_on_seed_and_name_alone():
    first, again, other_seed = build(0), build(0), build(1)
    deeper = build(0, CONFIG.model_copy(update={"num_heads": 4}), vocab_size=512)
    name = "layers.0.attention.q.weight"
    assert torch.equal(first[name], again[name])
    assert torch.equal(first[name], deeper[name])
    assert not torch.equal(first[name], other_seed[name])
    assert not torch.equal(first[name], first["layers.0.attention.k.weight"])

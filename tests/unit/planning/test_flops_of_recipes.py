"""What n:m recipes spare of a training step: by product, as the mathematics has it."""

import pytest
import torch

from sparsetrain.config import ModelConfig, SparsityRule
from sparsetrain.models import Transformer
from sparsetrain.planning.flops import ModelFlops
from sparsetrain.sparsity import Sparsifier

CONFIG = ModelConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=64)


@pytest.mark.parametrize(
    ("method", "spared"),
    [
        ("ste", 2 * 0.5),  # forward and input gradient; the weight gradient is dense
        ("sr_ste", 2 * 0.5),
        ("bdwp", 2 * 0.5),
        ("transposable", 2 * 0.5),
        ("mdgf", 0.0),  # nothing, while unseen weights fade out
        ("sdgf", 3 * 0.25),  # all three, of 3:4 at first
    ],
)
def test_a_step_spares_what_each_product_does_not_multiply(method: str, spared: float) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG, 64, 16)
    flops = ModelFlops.of(model, 16)
    rule = SparsityRule(params="*.ffn.*", method=method, pattern="2:4")
    sparse = Sparsifier([rule], total_steps=12).attach(model, None)
    ruled = sum(count for name, count in flops.linear.items() if ".ffn." in name)

    trained = flops.train_per_token(sparse.densities(), weight_gradient_densities=sparse.weight_gradient_densities())

    assert flops.train_per_token() - trained == pytest.approx(spared * ruled)

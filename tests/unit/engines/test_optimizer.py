import torch

from sparsetrain.config.model import ModelConfig
from sparsetrain.config.run import OptimizerConfig
from sparsetrain.engines.optimizer import build_optimizer
from sparsetrain.models import Transformer
from sparsetrain.moe import MoELayer

MODEL = ModelConfig(arch="gpt2", dim=16, num_layers=1, num_heads=2)


def test_matrices_decay_and_vectors_do_not():
    model = Transformer(MODEL, 64, 8)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert decay.pop(id(parameter)) == (0.0 if vector else 0.3), name
    assert not decay


def test_biases_of_stacked_experts_do_not_decay():
    layer = MoELayer(8, 4, num_experts=3, activation="gelu", bias=True)
    groups = build_optimizer(layer, OptimizerConfig(weight_decay=0.3), torch.device("cpu")).param_groups
    assert [{id(p) for p in group["params"]} for group in groups] == [
        {id(layer.router.weight)}, weights(layer.experts, "w"), weights(layer.experts, "b")
    ]  # fmt: skip
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0]


def weights(experts, kind):
    return {id(experts.get_parameter(f"{kind}_{side}")) for side in ("in", "out")}


def test_settings_reach_a_fused_adamw():
    config = OptimizerConfig(lr=3e-3, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (3e-3, (0.8, 0.9), 1e-6, True)


def test_frozen_parameters_are_left_out():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    (group,) = build_optimizer(layer, OptimizerConfig(), torch.device("cpu")).param_groups
    assert group["params"] == [layer.weight]

"""Mixture-of-experts layers give on a GPU what they give on a CPU."""

import copy

import pytest
import torch

from sparsetrain.moe import MoELayer, auxiliary_loss
from sparsetrain.testing import assert_close, requires_gpu

LAYERS = [
    {"router": "softmax_topk", "aux_loss": 0.1, "z_loss": 0.1},
    {"router": "softmax_topk", "capacity_factor": 0.8},
    {"router": "softmax_topk", "capacity_factor": 0.8, "overflow": "pad"},
    {"router": "sigmoid_topk", "aux_loss": 0.1, "aux_scope": "sequence", "shared_experts": 1},
    {"router": "expert_choice"},
    {"router": "hash", "activation": "gelu", "bias": True},
    {"router": "dense_to_sparse"},
    {"router": "relu"},
]


@requires_gpu
@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options.values())))
def test_outputs_gradients_losses_and_load_are_those_of_the_cpu(options):
    torch.manual_seed(0)
    layer = MoELayer(64, 96, num_experts=8, top_k=2, **options).double()
    x, ids = torch.randn(3, 50, 64, dtype=torch.float64), torch.randint(1000, (3, 50))
    results = []
    for device in ("cpu", "cuda"):
        on_device = copy.deepcopy(layer).to(device)
        y = on_device(x.to(device), ids.to(device))
        aux = auxiliary_loss(on_device)
        (y.square().sum() + aux.to(device)).backward()
        load = on_device.load.take().values.double()
        results.append([y, aux.double(), load, *(p.grad for p in on_device.parameters() if p.requires_grad)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected)

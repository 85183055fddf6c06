"""The same weights in Hugging Face's mixtures of experts give the same outputs, gradients and losses."""

import pytest
import torch

from sparsetrain.config.moe import SigmoidTopK, SoftmaxTopK
from sparsetrain.moe import MoELayer, auxiliary_loss
from sparsetrain.testing import assert_close

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
# Their routers compute softmax and sigmoid in float32 whatever the model's dtype is; relative to the largest entry.
TOLERANCE = 1e-6


def mixtral():
    from transformers.models.mixtral import modeling_mixtral as theirs

    config = transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    return theirs.MixtralSparseMoeBlock(config), MoELayer(16, 24, 4, 2)


def qwen3(norm_topk_prob: bool):
    from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, norm_topk_prob=norm_topk_prob
    )
    return theirs.Qwen3MoeSparseMoeBlock(config), MoELayer(16, 24, 6, 3, router=SoftmaxTopK(renormalise=norm_topk_prob))


def deepseek(norm_topk_prob: bool):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = transformers.DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )
    router = SigmoidTopK(kind="sigmoid_topk", renormalise=norm_topk_prob, scale=2.5)
    return theirs.DeepseekV3MoE(config), MoELayer(16, 24, 6, 3, router=router, shared_experts=2)


def assert_near(actual, expected):
    assert_close(actual, expected, rtol=0.0, atol=TOLERANCE * expected.abs().max().item())


def pairs(ours, theirs):
    """Our parameters beside theirs."""
    found = [
        (ours.router.weight, theirs.gate.weight),
        (ours.experts.w_in, theirs.experts.gate_up_proj),
        (ours.experts.w_out, theirs.experts.down_proj),
    ]
    if ours.shared is not None:
        for part in ("gate", "up", "down"):
            found.append((getattr(ours.shared, part).weight, getattr(theirs.shared_experts, f"{part}_proj").weight))
    return found


@pytest.mark.parametrize(
    "make",
    [mixtral, lambda: qwen3(True), lambda: qwen3(False), lambda: deepseek(True), lambda: deepseek(False)],
    ids=["mixtral", "qwen3-renormalised", "qwen3", "deepseek-v3-renormalised", "deepseek-v3"],
)
def test_outputs_and_gradients_equal_hugging_face(make):
    torch.manual_seed(0)
    theirs, ours = make()
    theirs, ours = theirs.double(), ours.double()
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            mine.copy_(other.normal_(std=0.5))
        if hasattr(ours.router, "bias"):
            ours.router.bias.copy_(theirs.gate.e_score_correction_bias.normal_(std=0.2))
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(inp) for module, inp in zip((ours, theirs), inputs, strict=True)]
    upstream = torch.randn_like(x)
    for y in outputs:
        y.backward(upstream)
    assert_near(*outputs)
    assert_near(inputs[0].grad, inputs[1].grad)
    for mine, other in pairs(ours, theirs):
        assert_near(mine.grad, other.grad)


def test_the_balance_loss_is_theirs_divided_by_top_k():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    layer, x = MoELayer(16, 24, 4, 2, aux_loss=1.0).double(), torch.randn(3, 11, 16, dtype=torch.float64)
    layer(x)
    logits = (x.flatten(0, 1) @ layer.router.weight.T).requires_grad_()
    assert_near(auxiliary_loss(layer), load_balancing_loss_func((logits,), 4, 2) / 2)

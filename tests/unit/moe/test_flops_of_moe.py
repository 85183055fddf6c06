import pytest
import torch
from sparsetrain_kernels.expert_ffn import reference
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.config.model import ModelConfig
from sparsetrain.models import Transformer
from sparsetrain.moe import experts
from sparsetrain.planning.flops import ModelFlops, parameter_counts

MOE = {"num_experts": 8, "top_k": 2, "ffn_dim": 96, "layers": [1], "shared_experts": 1}
LLAMA = ModelConfig(dim=64, num_layers=2, num_heads=4, ffn_dim=160, moe=MOE)
GPT2 = ModelConfig(arch="gpt2", dim=64, num_layers=2, num_heads=4, moe=MOE)
SHAPES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def meta_model(config: ModelConfig, vocab_size: int = 512, max_seq_len: int = 128) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, vocab_size, max_seq_len)


def visible_moe_ffn(*tensors, b_in, b_out, activation):
    """The experts in torch's own operators, whose FLOPs torch can count."""
    return reference.moe_ffn(*tensors, b_in=b_in, b_out=b_out, activation=activation)


@SHAPES
def test_parts_add_up_to_all_parameters(config):
    model = meta_model(config)
    assert parameter_counts(model).total == sum(parameter.numel() for parameter in model.parameters())


def test_a_token_uses_top_k_experts_and_the_shared_ones():
    counts = parameter_counts(meta_model(LLAMA))
    expert = 3 * 64 * 96
    assert counts.moe == 9 * expert
    assert counts.router == 8 * 64
    assert counts.ffn == 3 * 64 * 160
    assert counts.active == counts.total - 6 * expert


def test_the_sizes_of_mixtral_8x7b_are_the_published_ones():
    config = ModelConfig(
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        ffn_dim=14336,
        moe={"num_experts": 8, "top_k": 2},
    )
    counts = parameter_counts(meta_model(config, 32000, 4096))
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248


@SHAPES
def test_flops_are_those_that_torch_counts_where_nothing_is_dropped(monkeypatch, config):
    monkeypatch.setattr(experts, "moe_ffn", visible_moe_ffn)
    batch, seq_len = 2, 128
    model = Transformer(config, 512, seq_len)
    tokens = torch.randint(512, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counts = {str(op): flops / tokens.numel() for op, flops in counter.get_flop_counts()["Global"].items()}
    flops = ModelFlops.of(model, seq_len)
    matrices = sum(counts.get(f"aten.{op}", 0) for op in ("mm", "addmm"))
    assert matrices == pytest.approx(3 * (sum(flops.linear.values()) + flops.head), rel=1e-12)


def test_parameters_are_counted_whole_though_a_token_pays_for_a_share():
    flops = ModelFlops.of(meta_model(LLAMA), 128)
    gate = "layers.1.moe.experts.3.gate"
    assert flops.linear[gate] == 2 * 64 * 96 / 4
    assert flops.linear["layers.1.moe.shared.gate.weight"] == 2 * 64 * 96
    counts = parameter_counts(meta_model(LLAMA))
    assert flops.num_linear_parameters == counts.attention + counts.ffn + counts.moe + counts.router
    assert flops.train_per_token({gate: 0.5}) == flops.train_per_token() - 3 * 0.5 * flops.linear[gate]


def test_tokens_that_use_another_number_of_experts_pay_for_that():
    flops = ModelFlops.of(meta_model(LLAMA), 128)
    expert = 2 * 3 * 64 * 96
    assert flops.with_experts_per_token(2.0) is flops
    assert flops.with_experts_per_token(1.5).forward_per_token() == pytest.approx(
        flops.forward_per_token() - expert / 2
    )
    half = {name: 0.5 for name in flops.linear if ".experts." in name}
    more = flops.with_experts_per_token(6.0)
    assert more.forward_per_token(half) == pytest.approx(flops.forward_per_token() + expert)
    assert more.num_linear_parameters == flops.num_linear_parameters

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.config.model import ModelConfig
from sparsetrain.models import Transformer
from sparsetrain.planning.flops import ModelFlops, parameter_counts, spdf_flops

LLAMA = ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=160)
GPT2 = ModelConfig(arch="gpt2", dim=64, num_layers=2, num_heads=4)
SHAPES = pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, LLAMA.model_copy(update={"tie_embeddings": True})],
    ids=["llama-gqa", "gpt2", "llama-tied"],
)

GPT3_XL = {"num_layers": 24, "dim": 2048, "ffn_dim": 8192, "num_heads": 16, "tokens": 26e9}
GPT2_SMALL = {"num_layers": 12, "dim": 768, "ffn_dim": 3072, "num_heads": 12, "tokens": 2.5e9}


def meta_model(config: ModelConfig, vocab_size: int = 512, max_seq_len: int = 128) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, vocab_size, max_seq_len)


@SHAPES
def test_parts_add_up_to_all_parameters(config):
    model = meta_model(config)
    assert parameter_counts(model).total == sum(parameter.numel() for parameter in model.parameters())


def test_llama_parts_are_those_of_the_formula():
    counts = parameter_counts(meta_model(LLAMA))
    assert counts.embedding == counts.head == 512 * 64
    assert counts.attention == 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert counts.ffn == 2 * 3 * 64 * 160
    assert counts.norms == 5 * 64


@pytest.mark.parametrize(
    ("config", "vocab_size", "seq_len", "published"),
    [
        (ModelConfig(arch="gpt2", dim=768, num_layers=12, num_heads=12), 50257, 1024, 124_439_808),
        (ModelConfig(arch="gpt2", dim=1600, num_layers=48, num_heads=25), 50257, 1024, 1_557_611_200),
        (ModelConfig(dim=4096, num_layers=32, num_heads=32, ffn_dim=11008), 32000, 2048, 6_738_415_616),
        (
            ModelConfig(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336),
            128256,
            8192,
            8_030_261_248,
        ),
    ],
    ids=["gpt2-124M", "gpt2-xl-1.5B", "llama-2-7B", "llama-3-8B"],
)
def test_published_models_have_their_published_sizes(config, vocab_size, seq_len, published):
    assert parameter_counts(meta_model(config, vocab_size, seq_len)).total == published


def test_checkpoint_wrappers_change_no_count():
    model, wrapped = meta_model(LLAMA), meta_model(LLAMA)
    for i, layer in enumerate(wrapped.layers):
        wrapped.layers[i] = checkpoint_wrapper(layer)
    assert ModelFlops.of(wrapped, 128) == ModelFlops.of(model, 128)
    assert parameter_counts(wrapped) == parameter_counts(model)


def test_a_model_without_a_transformer_is_refused():
    with pytest.raises(ValueError, match="Linear holds no Transformer"):
        ModelFlops.of(torch.nn.Linear(2, 2), 16)
    with pytest.raises(ValueError, match="no parameter of a Transformer"):
        parameter_counts(torch.nn.Linear(2, 2))


@SHAPES
def test_flops_are_those_that_torch_counts_in_a_training_step(config):
    batch, seq_len = 2, 128
    model = Transformer(config, 512, seq_len)
    tokens = torch.randint(512, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counts = {str(op): flops / tokens.numel() for op, flops in counter.get_flop_counts()["Global"].items()}
    flops = ModelFlops.of(model, seq_len)

    assert counts["aten.mm"] + counts.get("aten.addmm", 0) == 3 * (sum(flops.linear.values()) + flops.head)
    # The CPU kernel multiplies causal blocks of 64 queries whole: (T + 64)/2 keys on average, where (T + 1)/2 are seen.
    blocked = 3 * flops.attention * (seq_len + 64) / (seq_len + 1)
    assert counts["aten.bmm"] + counts["aten.baddbmm"] == pytest.approx(blocked)


def sparse(heads, layers="all", **shape):
    attention = {"kind": "block_sparse", "block": 16, "heads": heads, "layers": layers}
    return ModelConfig(**LLAMA.model_dump() | {"attention": attention} | shape)


@pytest.mark.parametrize("num_blocks", [4, 64])
def test_attention_follows_the_layout_of_local_windows_and_sinks_by_the_formula(num_blocks):
    b, n, width = 16, num_blocks, 3
    local_and_sink = {"kind": "union", "of": [{"kind": "local", "width": width}, {"kind": "sink", "width": 1}]}
    flops = ModelFlops.of(meta_model(sparse([local_and_sink])), n * b)

    blocks_below_diagonal = sum(min(i, width) for i in range(n))  # width - 1 by the window, one by the sink
    pairs = n * b * (b + 1) / 2 + blocks_below_diagonal * b * b
    assert flops.attention == 2 * 2 * 2 * 64 * pairs / (n * b)  # layers, products, FLOPs a multiply-add, dim
    assert flops.attention_saved_per_token == 3 * (flops.dense_attention - flops.attention)


def test_attention_of_a_broken_last_block_of_other_heads_and_of_dense_layers_is_counted_token_by_token():
    config = sparse([{"kind": "strided", "stride": 4, "offset": 0}, {"kind": "local", "width": 1}], layers=[1])
    length = 3 * 16 + 5  # the first block for all, and each its own, of which the last has 5 tokens
    first_block = 16 * 17 / 2 + 37 * 16
    own_block = 3 * 16 * 17 / 2 + 5 * 6 / 2
    dense = length * (length + 1) / 2

    flops = ModelFlops.of(meta_model(config), length)

    assert flops.attention == pytest.approx(2 * 2 * 64 * (dense + (first_block + own_block) / 2) / length)
    assert flops.dense_attention == pytest.approx(2 * 2 * 2 * 64 * dense / length)


def test_a_dense_pattern_costs_what_dense_attention_costs():
    with torch.device("meta"):
        dense_pattern = ModelFlops.of(meta_model(sparse(["dense"])), 100)
    assert dense_pattern == ModelFlops.of(meta_model(LLAMA), 100)


def test_zeros_are_not_counted():
    flops = ModelFlops.of(meta_model(LLAMA), 128)
    up = "layers.1.ffn.up.weight"
    assert flops.linear[up] == 2 * 64 * 160
    assert flops.train_per_token({up: 0.25}) == flops.train_per_token() - 3 * 0.75 * flops.linear[up]
    assert flops.train_per_token({"head.weight": 0.5}) == flops.train_per_token() - 1.5 * flops.head
    everything = dict.fromkeys(flops.linear, 0.0)
    assert flops.layers_forward_per_token(everything) == flops.attention
    assert flops.num_linear_parameters == parameter_counts(meta_model(LLAMA)).attention + 2 * 3 * 64 * 160


def test_a_tied_head_goes_by_the_name_of_the_embedding():
    flops = ModelFlops.of(meta_model(GPT2), 128)
    assert flops.forward_per_token({"embed.weight": 0.0}) == flops.layers_forward_per_token()


@pytest.mark.parametrize(
    ("model", "sparsity", "flops", "ratio"),
    [
        (GPT3_XL, 0.0, 2.361e20, 1.0),
        (GPT3_XL, 0.5, 1.419e20, 0.601),
        (GPT3_XL, 0.75, 9.48e19, 0.401),
        (GPT2_SMALL, 0.0, 2.43e18, 1.0),
        (GPT2_SMALL, 0.5, 1.79e18, 0.737),
        (GPT2_SMALL, 0.75, 1.47e18, 0.606),
    ],
    ids=["xl-dense", "xl-50%", "xl-75%", "small-dense", "small-50%", "small-75%"],
)
def test_spdf_flops_are_the_published_ones(model, sparsity, flops, ratio):
    shape = {**model, "seq_len": 2048, "vocab_size": 50257}
    counted = spdf_flops(**shape, sparsity=sparsity)
    assert counted == pytest.approx(flops, rel=2e-3)
    assert counted / spdf_flops(**shape) == pytest.approx(ratio, abs=5e-4)

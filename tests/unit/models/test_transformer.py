import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sparsetrain.config.model import DenseAttention, ModelConfig
from sparsetrain.models import Transformer, initialize_, padded_vocab
from sparsetrain.testing import assert_close

VOCAB, SEQ_LEN = 128, 80
LLAMA = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, init_std=0.2)
GPT2 = ModelConfig(arch="gpt2", dim=32, num_layers=2, num_heads=4, init_std=0.2)
SHAPES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(config, VOCAB, SEQ_LEN)
    initialize_(model, config, seed=0)
    return model.to(dtype)


def batch(size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (size, SEQ_LEN))
    return tokens, torch.randint(VOCAB, (size, SEQ_LEN))


def loss_and_gradients(model, *inputs):
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_parameters_have_the_names_that_rules_and_checkpoints_use():
    names = {name for name, _ in build(LLAMA).named_parameters()}
    block = ["attention_norm", "attention.q", "attention.k", "attention.v", "attention.o"]
    block += ["ffn_norm", "ffn.gate", "ffn.up", "ffn.down"]
    layers = {f"layers.{i}.{part}.weight" for i in range(2) for part in block}
    assert names == layers | {"embed.weight", "norm.weight", "head.weight"}


def test_gpt2_has_positions_and_biases_and_a_tied_head():
    names = [name for name, _ in build(GPT2).named_parameters()]
    assert {"positions.weight", "layers.0.ffn.up.bias", "layers.1.attention.k.bias", "norm.bias"} <= set(names)
    assert not any("gate" in name or "head" in name for name in names)


@SHAPES
def test_a_token_changes_no_earlier_prediction(config):
    model, (tokens, _) = build(config), batch()
    changed = tokens.clone()
    changed[:, 50] = (changed[:, 50] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert_close(after[:, :50], before[:, :50])
    assert (after[:, 50:] - before[:, 50:]).abs().amax(dim=(0, 2)).min() > 1e-6


@SHAPES
def test_the_loss_is_the_sum_over_counted_tokens(config):
    model, (tokens, targets) = build(config), batch()
    targets[0, :30] = -100
    logits = model(tokens).flatten(0, 1)
    assert_close(model(tokens, targets), torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum"))


def test_packed_documents_do_not_see_each_other():
    config = LLAMA.model_copy(update={"attention": DenseAttention(within_documents=True)})
    model, (tokens, _) = build(config), batch()
    ids = (torch.arange(SEQ_LEN) >= 30).int().expand(2, -1)
    packed = model(tokens, document_ids_BT=ids)
    # Rotary embeddings see distances only: a document scores as if it stood alone.
    assert_close(packed[:, :30], model(tokens[:, :30]), rtol=1e-6, atol=1e-6)
    assert_close(packed[:, 30:], model(tokens[:, 30:]), rtol=1e-5, atol=1e-5)
    assert_close(build(LLAMA)(tokens, document_ids_BT=ids), model(tokens))


@SHAPES
def test_bf16_autocast_is_near_float32(config):
    config = config.model_copy(update={"init_std": 0.05})
    model, inputs = build(config, torch.float32), batch(8)
    exact = copy.deepcopy(loss_and_gradients(model, *inputs))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*inputs)
    model.zero_grad()
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, exact[0], rtol=1e-3, atol=0.0)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    gradient, expected = (
        torch.cat([grad.flatten() for grad in grads]) for grads in ([p.grad for p in model.parameters()], exact[1:])
    )
    assert (gradient - expected).norm() / expected.norm() < 0.02


@SHAPES
def test_activation_checkpointing_changes_nothing(config):
    model, inputs = build(config), batch()
    expected = copy.deepcopy(loss_and_gradients(model, *inputs))
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
    for actual, wanted in zip(loss_and_gradients(model, *inputs), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.slow
@SHAPES
def test_compiles_as_one_graph_with_the_same_gradients(config):
    config = config.model_copy(update={"attention": DenseAttention(within_documents=True)})
    model, (tokens, targets) = build(config), batch()
    inputs = tokens, targets, (torch.arange(SEQ_LEN) // 33).int().expand(2, -1)
    expected = copy.deepcopy(loss_and_gradients(model, *inputs))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(loss_and_gradients(compiled, *inputs), expected, strict=True):
        assert_close(actual, wanted)


def test_a_sample_beyond_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match="81 tokens do not fit the model's 80 learned positions"):
        build(GPT2)(torch.zeros(1, SEQ_LEN + 1, dtype=torch.int64))


def test_rotary_embeddings_go_beyond_the_trained_length():
    assert build(LLAMA)(torch.zeros(1, SEQ_LEN + 1, dtype=torch.int64)).shape == (1, SEQ_LEN + 1, VOCAB)


@SHAPES
def test_the_meta_device_is_enough_for_shapes(config):
    with torch.device("meta"):
        model, tokens = Transformer(config, VOCAB, SEQ_LEN), torch.zeros(2, SEQ_LEN, dtype=torch.int64)
    assert model(tokens).shape == (2, SEQ_LEN, VOCAB)
    assert model(tokens, tokens).shape == ()
    filled = model.to_empty(device="cpu")
    initialize_(filled, config, seed=0)
    expected = build(config, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(("size", "rows"), [(1, 64), (64, 64), (257, 320), (50257, 50304)])
def test_vocabularies_are_padded_to_multiples_of_64(size, rows):
    assert padded_vocab(size) == rows

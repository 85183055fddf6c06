"""The same weights in Hugging Face's implementations give the same logits, loss and gradients."""

import pytest
import torch

from sparsetrain.config.model import ModelConfig
from sparsetrain.models import Transformer, initialize_
from sparsetrain.models.hugging_face import to_hugging_face
from sparsetrain.testing import assert_close

transformers = pytest.importorskip("transformers")

VOCAB, SEQ_LEN = 192, 96
LLAMA = {"dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 160}
# Relative to the largest entry: rounding of sums in another order. A wrong formula is off by far more.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def hugging_face_llama(config: ModelConfig) -> torch.nn.Module:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=SEQ_LEN,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.ties_embeddings,
        )
    )
    # Its own RMSNorm rounds to float32, which would hide a float64 comparison.
    for block in [model.model, *model.model.layers]:
        for name, module in list(block.named_children()):
            if type(module).__name__ == "LlamaRMSNorm":
                setattr(block, name, torch.nn.RMSNorm(config.dim, config.norm_eps))
    return model


def hugging_face_gpt2(config: ModelConfig) -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=SEQ_LEN,
            n_embd=config.dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            layer_norm_epsilon=config.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("config", "peer"),
    [
        (ModelConfig(**LLAMA), hugging_face_llama),
        (ModelConfig(**LLAMA, num_kv_heads=2, rope_theta=500.0), hugging_face_llama),
        (ModelConfig(**LLAMA, num_kv_heads=1, tie_embeddings=True), hugging_face_llama),
        (ModelConfig(arch="gpt2", dim=64, num_layers=2, num_heads=4), hugging_face_gpt2),
    ],
    ids=["llama", "llama-gqa", "llama-mqa-tied", "gpt2"],
)
def test_logits_loss_and_gradients_equal_hugging_face(config, peer, dtype):
    config = config.model_copy(update={"init_std": 0.2})  # far from linear, so that every part matters
    model = Transformer(config, VOCAB, SEQ_LEN)
    initialize_(model, config, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)  # norms and biases too
    model = model.to(dtype)
    theirs = peer(config).to(dtype).train()
    missing, unexpected = theirs.load_state_dict(to_hugging_face(config, model.state_dict()), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}

    tokens = torch.randint(VOCAB, (3, SEQ_LEN))
    targets = torch.randint(VOCAB, (3, SEQ_LEN))
    targets[:, ::5] = -100
    expected = theirs(input_ids=tokens).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    expected_loss.backward()
    loss = model(tokens, targets)
    loss.backward()

    pairs = [(model(tokens), expected), (loss, expected_loss)]
    gradients = to_hugging_face(config, {name: parameter.grad for name, parameter in model.named_parameters()})
    pairs += [(gradients[name], parameter.grad) for name, parameter in theirs.named_parameters()]
    for actual, wanted in pairs:
        largest = wanted.abs().max()
        assert_close(actual / largest, wanted / largest, rtol=0.0, atol=TOLERANCE[dtype])

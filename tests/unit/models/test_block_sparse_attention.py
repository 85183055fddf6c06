from types import MethodType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.config import ModelConfig
from sparsetrain.models import Transformer, initialize_
from sparsetrain.models.attention_layouts import AttentionLayouts, attention_layout
from sparsetrain.models.block_sparse_attention import document_borders

LOCAL = {"kind": "local", "width": 2}
S2 = {"kind": "union", "of": [{"kind": "local", "width": 1}, {"kind": "strided", "stride": 4}]}
SINK = {"kind": "union", "of": [LOCAL, {"kind": "sink", "width": 1}]}
BIGBIRD = {"kind": "union", "of": [LOCAL, {"kind": "sink", "width": 1}, {"kind": "random", "count": 2, "seed": 3}]}
GAPS = {"kind": "dilated", "width": 2, "dilation": 3}
BOTH = {"kind": "union", "of": [LOCAL, {"kind": "intersection", "of": [{"kind": "strided", "stride": 2}, GAPS]}]}

VOCAB, LENGTH = 48, 100


def config(heads: list[object], *, layers: object = "all", documents: bool = False, **changes: object) -> ModelConfig:
    attention = {"kind": "block_sparse", "block": 16, "heads": heads, "layers": layers, "within_documents": documents}
    shape = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "init_std": 0.2}
    return ModelConfig(**shape | {"attention": attention} | changes)


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config, VOCAB, LENGTH)
    initialize_(model, config, 0)
    return model.double()


def samples(num_tokens: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Tokens, and ids of documents of many lengths, others in each sample."""
    draw = torch.Generator().manual_seed(1)
    begins = torch.rand(2, num_tokens, generator=draw) < 0.06
    return torch.randint(VOCAB, (2, num_tokens), generator=draw), begins.int().cumsum(1, dtype=torch.int32)


def dense_twin(sparse: Transformer) -> Transformer:
    """A dense model with the same weights, whose sparse layers attend through a mask, token by token."""
    config = sparse.config
    attention = {"kind": "dense", "within_documents": config.attention.within_documents}
    dense = Transformer(ModelConfig(**config.model_dump() | {"attention": attention}), VOCAB, LENGTH).double()
    dense.load_state_dict(sparse.state_dict())
    blocks = attention_layout(config.attention, config.num_heads, LENGTH).to_mask()
    tokens = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2).tril()

    def attend(self: object, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
        length = q.shape[1]
        mask = tokens[:, :length, :length]
        if ids is not None:
            mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    for layer in config.sparse_attention_layers:
        module = dense.layers[layer].attention
        module._attend = MethodType(attend, module)
    return dense


@pytest.mark.parametrize("num_tokens", [LENGTH, 96, 16, 5], ids=lambda n: f"T{n}")
@pytest.mark.parametrize(
    "config",
    [
        config([S2]),
        config([SINK], num_kv_heads=2, documents=True),
        config([BIGBIRD], layers=[1], num_kv_heads=1),
        config([BOTH, "dense"], documents=True, layers={"every": 2}),
        config([{**S2, "num_heads": 3}, {**GAPS, "num_heads": 1}], arch="gpt2"),
    ],
    ids=["s2", "sink-gqa-documents", "bigbird-one-layer-mqa", "intersection-and-dense-documents", "gpt2-counted-heads"],
)
def test_loss_and_all_gradients_are_those_of_the_dense_model_with_the_same_mask(config, num_tokens):
    sparse = model_of(config)
    dense = dense_twin(sparse)
    tokens, ids = samples(num_tokens)

    losses = [model(tokens, tokens.roll(-1, 1), ids) for model in (sparse, dense)]
    for loss in losses:
        loss.backward()

    torch.testing.assert_close(*losses, rtol=1e-7, atol=0)
    for (name, mine), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_checkpoint_of_the_dense_model_loads_into_the_sparse_one_and_back():
    sparse = model_of(config([S2], num_kv_heads=2))
    dense = Transformer(ModelConfig(**sparse.config.model_dump() | {"attention": "dense"}), VOCAB, LENGTH).double()
    assert {name: w.shape for name, w in dense.state_dict().items()} == {
        name: w.shape for name, w in sparse.state_dict().items()
    }
    dense.load_state_dict(sparse.state_dict())
    sparse.load_state_dict(dense.state_dict())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 99], ids=lambda n: f"T{n}")
def test_what_is_predicted_next_does_not_depend_on_how_long_the_sample_goes_on(length):
    model = model_of(config([BIGBIRD, S2]))
    tokens, _ = samples()
    whole, part = model(tokens), model(tokens[:, :length])
    torch.testing.assert_close(part[:, -1], whole[:, length - 1])


def test_the_heads_of_s2_attention_share_out_the_whole_context():
    for num_tokens in (16, 64, 100, 160):
        seen = attention_layout(config([S2]).attention, 4, num_tokens).to_mask()
        assert torch.equal(seen.any(0), torch.ones_like(seen[0]).tril())
        far = seen & torch.ones_like(seen).tril(-1)
        assert (far.sum(0) <= 1).all(), "beyond the query's own block no two heads see the same"


def test_layers_share_layouts_and_so_do_samples_of_as_many_blocks():
    model = model_of(config([S2]))
    assert model.layers[0].attention.layouts is model.layers[1].attention.layouts
    layouts = AttentionLayouts(config([S2]).attention, 4)
    cpu = torch.device("cpu")
    assert layouts.at(49, cpu) is layouts.at(64, cpu)
    assert layouts.at(65, cpu) is not layouts.at(64, cpu)


def test_borders_of_documents_are_their_first_tokens_and_the_end():
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]], dtype=torch.int32)
    borders = document_borders(ids)
    assert borders.tolist() == [0, 2, 5, 6, 8, 10, 10, 10, 10, 10, 10]
    assert document_borders(torch.zeros(1, 3, dtype=torch.int32)).tolist() == [0, 3, 3, 3]


def test_documents_beside_each_other_in_two_samples_stay_apart():
    model = model_of(config([SINK], documents=True))
    tokens, _ = samples()
    ids = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens, None, ids)[1], model(tokens[1:], None, ids[1:])[0])


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_finds_its_layouts():
    model = model_of(config([SINK], documents=True, num_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for num_tokens in (40, LENGTH):
        tokens, ids = samples(num_tokens)
        torch.testing.assert_close(compiled(tokens, tokens, ids), model(tokens, tokens, ids))

import pytest

from sparsetrain.config import InvalidConfig, ModelConfig
from sparsetrain.config.moe import RouterConfig
from sparsetrain.config.navigate import kinds_of, sections_in
from sparsetrain.models import Transformer
from sparsetrain.moe import ExpertSpec, moe_layers
from sparsetrain.moe.losses import LossWeights

SHAPE = {"dim": 8, "num_layers": 4, "num_heads": 2}


def config(**moe) -> ModelConfig:
    return ModelConfig(**SHAPE, moe={"num_experts": 4, **moe})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3)),
        ({"every": 1}, (0, 1, 2, 3)),
        ({"every": 2}, (1, 3)),
        ({"every": 3}, (2,)),
        ([3, 1], (1, 3)),
    ],
    ids=str,
)
def test_layers_are_chosen_in_three_ways(layers, expected):
    assert config(layers=layers).moe_layers == expected


def test_a_dense_model_has_no_moe_layers():
    assert ModelConfig(**SHAPE).moe_layers == ()


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"top_k": 5}, "moe.top_k = 5: a token cannot use more experts than num_experts=4"),
        ({"overflow": "pad"}, "moe.overflow = pad: nothing overflows without a capacity_factor"),
        ({"num_experts": 0}, "moe.num_experts = 0: must be above 0"),
        ({"layers": [0, 4]}, "moe.layers = [0, 4]: there is no layer 4; num_layers=4, counted from 0"),
        ({"layers": [-1]}, "moe.layers.0 = -1: must be at least 0"),
        ({"layers": [2, 2]}, "moe.layers = [2, 2]: names a layer twice"),
        ({"layers": []}, "moe.layers = []: expected at least 1 value(s)"),
        ({"layers": {"every": 5}}, "moe.layers.every = 5: must not be above num_layers=4"),
        ({"layers": "some"}, "moe.layers = some: expected all, {every: k} or a list of layers"),
        ({"layers": 2}, "moe.layers = 2: expected all, {every: k} or a list of layers"),
        ({"router": "softmax_topc"}, "did you mean softmax_topk?"),
        ({"router": {"kind": "hash", "sed": 1}}, "moe.router.sed = 1: unknown key; did you mean seed?"),
        ({"router": "replay"}, "moe.router.trace: missing"),
        ({"capacity_factor": 0}, "moe.capacity_factor = 0: must be above 0"),
        ({"router": "hash", "aux_loss": 0.1}, "moe.aux_loss = 0.1: the load of router=hash is not learned"),
        ({"router": "hash", "z_loss": 0.1}, "moe.z_loss = 0.1: router=hash has no logits"),
        (
            {"router": {"kind": "dense_to_sparse", "start_temperature": 0.1}},
            "moe.router.end_temperature: must not be above start_temperature=0.1",
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_with_key_value_and_fix(moe, message):
    with pytest.raises(InvalidConfig) as error:
        config(**moe)
    assert message in str(error.value)


def test_the_balance_loss_is_on_where_the_router_needs_it():
    weights = {
        kind: config(router={"kind": kind, "trace": "t.npz"} if kind == "replay" else kind).moe.balance_weight
        for kind in kinds_of(sections_in(RouterConfig))
    }
    assert {kind for kind, weight in weights.items() if weight} == {"softmax_topk", "dense_to_sparse"}
    assert config(aux_loss=0).moe.balance_weight == 0
    assert config(router="sigmoid_topk", aux_loss=0.5).moe.balance_weight == 0.5


def test_a_written_config_reads_back_the_same():
    for moe in ({}, {"router": "hash", "layers": [1]}, {"layers": {"every": 2}, "router": "relu"}):
        whole = config(**moe)
        assert ModelConfig(**whole.model_dump()) == whole


def test_a_models_layers_have_every_setting_of_the_config():
    settings = {
        "top_k": 3,
        "ffn_dim": 12,
        "layers": [1, 3],
        "router": {"kind": "hash", "seed": 5},
        "shared_experts": 2,
        "capacity_factor": 1.5,
        "overflow": "pad",
    }
    (_, first), (path, second) = moe_layers(Transformer(config(**settings), 16, 8))
    assert path == "layers.3.moe"
    assert second.experts.spec == ExpertSpec(8, 12, "swiglu", bias=False)
    assert (second.router.num_experts, second.router.top_k, second.router.seed) == (4, 3, 5)
    assert (first.router.layer, second.router.layer) == (0, 1)
    assert second.shared.up.weight.shape == (24, 8)
    assert (second.capacity_factor, second.overflow) == (1.5, "pad")
    losses = {"aux_loss": 0.3, "z_loss": 0.2, "aux_scope": "sequence"}
    (_, layer), *_ = moe_layers(Transformer(config(**losses), 16, 8))
    assert layer.loss_weights == LossWeights(**losses)
    (_, layer), *_ = moe_layers(Transformer(config(), 16, 8))
    assert layer.loss_weights == LossWeights(aux_loss=0.01)
    assert layer.experts.spec.ffn_dim == ModelConfig(**SHAPE).hidden_dim
    gpt2 = ModelConfig(**SHAPE, arch="gpt2", moe={"num_experts": 2})
    assert moe_layers(Transformer(gpt2, 16, 8))[0][1].experts.spec == ExpertSpec(8, 32, "gelu", bias=True)

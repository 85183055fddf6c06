import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsetrain.config.model import ModelConfig
from sparsetrain.config.moe import Replay
from sparsetrain.errors import PlacementError
from sparsetrain.models import Transformer
from sparsetrain.moe import MoELayer, build_router
from sparsetrain.moe.placement.trace import LoadTrace
from sparsetrain.moe.routers.replay import share_rows
from sparsetrain.parallel import MoEController
from sparsetrain.testing import assert_close

STEPS, LAYERS, SOURCES, EXPERTS, TOP_K = 3, 2, 2, 5, 2


@pytest.fixture
def trace(tmp_path) -> LoadTrace:
    by_source = np.random.default_rng(0).integers(0, 50, (STEPS, LAYERS, SOURCES, EXPERTS))
    recorded = LoadTrace(np.arange(STEPS), by_source.sum(axis=2), TOP_K, by_source)
    recorded.save(tmp_path / "trace.npz")
    return recorded


def router(tmp_path, layer: int = 0, num_experts: int = EXPERTS, top_k: int = TOP_K):
    return build_router(Replay(kind="replay", trace=str(tmp_path / "trace.npz")), 4, num_experts, top_k, layer=layer)


@st.composite
def loads(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    load = np.array(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=8)))
    num_tokens, top_k = draw(st.integers(0, 60)), draw(st.integers(1, len(load)))
    return load, num_tokens * top_k, num_tokens


@given(loads())
def test_rows_are_shared_in_proportion_and_none_is_lost(case):
    load, total, most = case
    rows = share_rows(load, total, most)
    assert rows.sum() == total
    assert rows.min() >= 0
    assert rows.max() <= most
    if load.sum() and total * load.max() <= most * load.sum():  # nobody is full
        assert np.abs(rows - total * load / load.sum()).max() < 1


@pytest.mark.parametrize(
    ("load", "total", "most", "expected"),
    [
        ([10, 0, 0], 6, 3, [3, 2, 1]),
        ([8, 1, 1], 6, 3, [3, 2, 1]),
        ([0, 0, 0], 7, 4, [3, 2, 2]),
        ([3, 2, 1], 6, 3, [3, 2, 1]),
    ],
    ids=str,
)
def test_what_an_expert_cannot_take_goes_to_the_others(load, total, most, expected):
    assert share_rows(np.array(load), total, most).tolist() == expected


@pytest.mark.parametrize("layer", [0, 1])
def test_experts_get_the_load_of_the_step(tmp_path, trace, layer):
    replay, x = router(tmp_path, layer), torch.randn(40, 4)
    for step in (0, 1, 2, 0):  # the trace begins anew
        routing = replay(x)
        assert routing.counts_E.tolist() == share_rows(trace.load_NLE[step, layer], 80, 40).tolist()
        assert torch.bincount(routing.token_R).eq(TOP_K).all()
        pairs = list(zip(routing.expert_R.tolist(), routing.token_R.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
        replay.after_step(routing.counts_E)


def test_a_resumed_run_goes_on_with_the_step_that_is_next(tmp_path, trace):
    first, again = (nn.ModuleList([MoELayer(4, 3, EXPERTS, TOP_K, router=router(tmp_path))]) for _ in range(2))
    controller = MoEController(first)
    for _ in range(2):
        controller.after_step()
    MoEController(again).load_state_dict(controller.state_dict())
    assert [layer.router(torch.randn(40, 4)).counts_E.tolist() for layer in (first[0], again[0])] == [
        share_rows(trace.load_NLE[2, 0], 80, 40).tolist()
    ] * 2


def test_a_source_gets_its_own_load(tmp_path, trace):
    replay = router(tmp_path)
    replay.source = 1
    assert replay(torch.randn(40, 4)).counts_E.tolist() == share_rows(trace.load_NLSE[0, 0, 1], 80, 40).tolist()


def test_weights_are_learned_though_routes_are_not(tmp_path, trace):
    torch.manual_seed(0)
    replay = router(tmp_path).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    routing = replay(x)
    logits = x @ replay.weight.T
    for token in range(9):
        mine = routing.token_R == token
        expected = logits[token, routing.expert_R[mine]].softmax(0)
        assert_close(routing.weight_R[mine], expected)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(replay, {"weight": w}, (x,)).weight_R, replay.weight
    )


def test_a_layer_replays(tmp_path, trace):
    layer = MoELayer(4, 3, EXPERTS, TOP_K, router=Replay(kind="replay", trace=str(tmp_path / "trace.npz")), layer=1)
    for tokens in (0, 1, 7):
        assert layer(torch.randn(tokens, 4)).shape == (tokens, 4)


@pytest.mark.parametrize(
    "arguments", [{"layer": 2}, {"num_experts": 6}, {"top_k": 3}], ids=["too-few-layers", "experts", "top_k"]
)
def test_the_trace_of_another_model_is_refused(tmp_path, trace, arguments):
    with pytest.raises(PlacementError, match=r"router.trace = .*trace.npz: .* belongs to another model"):
        router(tmp_path, **arguments)


def test_a_model_with_fewer_moe_layers_than_the_trace_is_refused_when_it_is_built(tmp_path, trace):
    def model(num_layers: int) -> Transformer:
        moe = {"num_experts": EXPERTS, "router": {"kind": "replay", "trace": str(tmp_path / "trace.npz")}}
        with torch.device("meta"):
            return Transformer(ModelConfig(dim=8, num_layers=num_layers, num_heads=2, moe=moe), 16, 8)

    model(2)
    with pytest.raises(PlacementError, match=r"it has 2 MoE layers .* and this model has 1"):
        model(1)


def test_a_missing_trace_is_named(tmp_path):
    with pytest.raises(PlacementError, match=r"there is no load trace at .*trace\.npz"):
        router(tmp_path)

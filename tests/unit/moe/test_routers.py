"""Every router against its equation, one token at a time; gradients by finite differences."""

import math

import pytest
import torch
from torch import Tensor

from sparsetrain.config.moe import DenseToSparse, ExpertChoice, Hash, ReluGate, SigmoidTopK, SoftmaxTopK
from sparsetrain.errors import ConfigError, MoeError
from sparsetrain.moe import MoELayer, Router, Routing, build_router
from sparsetrain.moe.routers.relu import chunk_sparsity_loss, locality_loss
from sparsetrain.parallel import MoEController
from sparsetrain.sharding import weight_shards
from sparsetrain.testing import assert_close

DIM, SEQ_LEN = 6, 7
LEARNED = [
    SoftmaxTopK(),
    SoftmaxTopK(renormalise=False),
    SigmoidTopK(kind="sigmoid_topk"),
    SigmoidTopK(kind="sigmoid_topk", renormalise=False, scale=2.5),
    ExpertChoice(kind="expert_choice"),
    DenseToSparse(kind="dense_to_sparse", threshold=0.15),
    ReluGate(kind="relu"),
]
ALL = [*LEARNED, Hash(kind="hash")]
SHAPES = pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 3, 2), (1, 1, 1), (2 * SEQ_LEN, 5, 1), (SEQ_LEN, 4, 4), (3 * SEQ_LEN, 8, 3)],
    ids=lambda size: str(size),
)


def name_of(config) -> str:
    settings = config.model_dump(exclude_defaults=True, exclude={"kind"})
    return "-".join([config.kind, *(f"{key}={value}" for key, value in settings.items())])


def build(config, num_experts: int, top_k: int) -> Router:
    torch.manual_seed(1)
    router = build_router(config, DIM, num_experts, top_k).double()
    for parameter in router.parameters():
        parameter.data.normal_()
    return router


def tokens(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def route(router: Router, x_TD: Tensor) -> Routing:
    return router(x_TD, seq_len=min(SEQ_LEN, len(x_TD)), token_ids_T=torch.arange(len(x_TD)) % 5)


def dense_weights(routing: Routing) -> Tensor:
    """[T, E]: what each expert's output is multiplied with."""
    weights = torch.zeros(routing.num_tokens, routing.num_experts, dtype=routing.weight_R.dtype)
    return weights.index_put((routing.token_R, routing.expert_R), routing.weight_R)


def softmax(logits: Tensor) -> Tensor:
    exps = [math.exp(value) for value in logits.tolist()]
    return torch.tensor(exps, dtype=torch.float64) / sum(exps)


def largest(values: Tensor, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda place: values[place].item(), reverse=True)[:count]


def naive_weights(config, router: Router, x_TD: Tensor) -> Tensor:
    """Each router's equation, in loops."""
    num_experts, top_k = router.num_experts, router.top_k
    out = torch.zeros(len(x_TD), num_experts, dtype=torch.float64)
    logits = [router.weight @ x for x in x_TD]
    if config.kind == "expert_choice":
        seq_len = min(SEQ_LEN, len(x_TD))
        for first in range(0, len(x_TD), SEQ_LEN):
            scores = torch.stack([softmax(logits[t]) for t in range(first, first + seq_len)])
            for e in range(num_experts):
                for t in largest(scores[:, e], math.ceil(seq_len * top_k / num_experts)):
                    out[first + t, e] = scores[t, e]
        return out
    for t, logit in enumerate(logits):
        if config.kind == "softmax_topk":
            scores = softmax(logit)
            chosen = largest(scores, top_k)
        elif config.kind == "sigmoid_topk":
            scores = 1 / (1 + torch.exp(-logit))
            chosen = largest(scores + router.bias, top_k)
        elif config.kind == "dense_to_sparse":
            scores = softmax(logit / config.start_temperature)
            chosen = sorted({*largest(scores, top_k), *(e for e in range(num_experts) if scores[e] >= 0.15)})
        else:
            positive = torch.where(logit > 0, logit, 0.0)
            scores = positive / (positive.square().mean() + 1e-6).sqrt() * router.norm.weight
            chosen = [e for e in range(num_experts) if logit[e] > 0]
        total = scores[chosen].sum() if getattr(config, "renormalise", False) else 1.0
        out[t, chosen] = (scores[chosen] / total * getattr(config, "scale", 1.0)).detach()
    return out


@SHAPES
@pytest.mark.parametrize("config", LEARNED, ids=name_of)
def test_weights_are_those_of_the_equation(config, num_tokens, num_experts, top_k):
    router, x = build(config, num_experts, top_k), tokens(num_tokens)
    assert_close(dense_weights(route(router, x)), naive_weights(config, router, x))


@SHAPES
@pytest.mark.parametrize("config", ALL, ids=name_of)
def test_rows_are_sorted_by_expert_then_token_and_counted(config, num_tokens, num_experts, top_k):
    routing = route(build(config, num_experts, top_k), tokens(num_tokens))
    rows = list(zip(routing.expert_R.tolist(), routing.token_R.tolist(), strict=True))
    assert rows == sorted(set(rows))
    assert routing.counts_E.tolist() == [sum(expert == e for expert, _ in rows) for e in range(num_experts)]
    assert routing.weight_R.shape == routing.token_R.shape
    assert (routing.num_tokens, routing.dropped.item()) == (num_tokens, 0)
    if config.kind in ("softmax_topk", "sigmoid_topk", "hash"):
        assert sorted(token for _, token in rows) == [t for t in range(num_tokens) for _ in range(top_k)]


@pytest.mark.parametrize("config", LEARNED, ids=name_of)
def test_gradients_of_weights_scores_and_logits_are_exact(config):
    router, x = build(config, 5, 2), tokens(2 * SEQ_LEN).requires_grad_()

    def outputs(x_TD: Tensor, weight: Tensor) -> list[Tensor]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x_TD,), {"seq_len": SEQ_LEN})
        return [out for out in (routing.weight_R, routing.scores_TE, routing.logits_TE) if out is not None]

    # gradcheck passes over what has no gradient
    assert all(out.requires_grad for out in outputs(x, router.weight))
    assert torch.autograd.gradcheck(outputs, (x, router.weight))


@pytest.mark.parametrize("config", ALL, ids=name_of)
def test_scores_add_up_to_one_where_a_token_has_experts(config):
    routing = route(build(config, 5, 2), tokens(2 * SEQ_LEN))
    if config.kind in ("hash", "expert_choice"):
        assert routing.scores_TE is None
    else:
        has_experts = torch.zeros(routing.num_tokens).index_fill(0, routing.token_R, 1)
        assert_close(routing.scores_TE.sum(1), has_experts.double())


@pytest.mark.parametrize("config", ALL, ids=name_of)
def test_weights_add_up_to_what_the_router_says(config):
    router = build(config, 5, 2)
    sums = dense_weights(route(router, tokens(2 * SEQ_LEN))).sum(1)
    if router.weight_sum is None:
        assert sums.std() > 1e-3
    else:
        assert_close(sums, torch.full_like(sums, router.weight_sum))


@pytest.mark.parametrize("config", LEARNED, ids=name_of)
def test_routers_compute_in_float32_under_autocast(config):
    router, x = build(config, 5, 2).float(), tokens(2 * SEQ_LEN).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = route(router, x)
    expected = route(router, x.float())
    assert actual.weight_R.dtype == torch.float32
    assert torch.equal(dense_weights(actual), dense_weights(expected))


@pytest.mark.parametrize("config", [SoftmaxTopK(), SigmoidTopK(kind="sigmoid_topk")], ids=name_of)
def test_ties_give_a_token_different_experts(config):
    router = build(config, 6, 4)
    router.weight.data.zero_()
    for parameter in router.parameters():
        parameter.data.zero_()
    weights = dense_weights(route(router, tokens(SEQ_LEN)))
    assert (weights != 0).sum(1).eq(4).all()
    assert_close(weights[weights != 0], torch.full((4 * SEQ_LEN,), 0.25))


def test_a_bias_moves_choices_but_not_weights():
    router = build(SigmoidTopK(kind="sigmoid_topk"), 4, 1)
    router.bias.data = torch.tensor([0.0, 0.0, 10.0, 0.0], dtype=torch.float64)
    routing = route(router, tokens(SEQ_LEN))
    assert routing.counts_E.tolist() == [0, 0, SEQ_LEN, 0]
    assert_close(routing.weight_R, torch.ones(SEQ_LEN))  # the bias would make it 10/10.5 or so without the division


def test_the_bias_follows_the_sign_of_the_missing_load():
    router = build(SigmoidTopK(kind="sigmoid_topk", bias_update_rate=0.5), 4, 1)
    router.bias.data.zero_()
    router.after_step(torch.tensor([10, 2, 0, 0]))
    router.after_step(torch.tensor([3, 3, 3, 3]))
    router.after_step(torch.tensor([0, 0, 0, 0]))
    assert router.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_the_bias_evens_out_a_skewed_load():
    router, x = build(SigmoidTopK(kind="sigmoid_topk", bias_update_rate=0.01), 4, 1), tokens(400) + 1
    router.bias.data.zero_()
    before = route(router, x).counts_E
    for _ in range(300):
        router.after_step(route(router, x).counts_E)
    after = route(router, x).counts_E
    assert before.max() > 140
    assert after.max() < 110


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bias_of_a_model_in_half_precision_does_not_stand_still(dtype):
    layer = MoELayer(DIM, 4, 4, 1, router="sigmoid_topk").to(dtype)
    layer.router.bias.data.fill_(0.5)
    layer.router.after_step(torch.tensor([10, 2, 0, 0]))
    assert layer.router.weight.dtype == dtype
    assert layer(torch.ones(SEQ_LEN, DIM, dtype=dtype)).dtype == dtype
    assert_close(layer.router.bias, torch.tensor([0.499, 0.501, 0.501, 0.501]))
    assert layer.double().router.bias.dtype == torch.float64


def test_the_bias_is_a_weight_that_no_optimizer_touches():
    router = build(SigmoidTopK(kind="sigmoid_topk"), 4, 1)
    assert {shard.name for shard in weight_shards(router)} == {"weight", "bias"}
    optimizer = torch.optim.AdamW(router.parameters(), lr=1.0)
    before = router.bias.clone()
    route(router, tokens(SEQ_LEN)).weight_R.sum().backward()
    optimizer.step()
    assert torch.equal(router.bias, before)


def test_expert_choice_does_not_depend_on_how_sequences_are_batched():
    router, x = build(ExpertChoice(kind="expert_choice"), 4, 2), tokens(3 * SEQ_LEN)
    alone = torch.cat([dense_weights(route(router, part)) for part in x.split(SEQ_LEN)])
    assert torch.equal(dense_weights(route(router, x)), alone)


def test_hash_depends_on_the_token_id_layer_and_seed_alone():
    ids = torch.tensor([3, 9, 3, 1000, 9])
    routers = [
        build_router(Hash(kind="hash", seed=s), DIM, 16, 3, layer=at) for s, at in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    first, again, other_layer, other_seed = (dense_weights(r(tokens(5), token_ids_T=ids)) for r in routers)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[4])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, again)
    assert not torch.equal(first, other_layer)
    assert not torch.equal(first, other_seed)
    assert_close(first.sum(1), torch.ones(5))


def test_hash_spreads_token_ids_evenly():
    router = build_router("hash", DIM, 8, 2)
    counts = router(torch.zeros(4000, DIM), token_ids_T=torch.arange(4000)).counts_E
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(("ids", "given"), [(None, "none"), (torch.arange(3), "3")])
def test_hash_wants_the_id_of_every_token(ids, given):
    with pytest.raises(MoeError, match=f"needs the ids of 5 tokens and got {given}"):
        build_router("hash", DIM, 4, 2)(tokens(5), token_ids_T=ids)


def test_dense_to_sparse_goes_from_all_experts_to_top_k():
    router, x = build(DenseToSparse(kind="dense_to_sparse", until=0.8), 8, 2), tokens(100)
    used, temperatures = [], []
    for fraction in (0.0, 0.2, 0.4, 0.6, 0.79, 0.8, 1.0):
        router.set_progress(fraction)
        used.append(len(route(router, x).token_R) / 100)
        temperatures.append(router.temperature)
    assert used[0] > 7
    assert used == sorted(used, reverse=True)
    assert 2 < used[4] < 6
    assert used[5] == used[6] == 2
    assert temperatures[0] == pytest.approx(2.0)
    assert temperatures[2] == pytest.approx((2.0 * 0.3) ** 0.5)  # halfway on a logarithmic scale
    assert temperatures[5] == temperatures[6] == pytest.approx(0.3)


def test_dense_to_sparse_goes_on_where_a_resumed_run_left_off():
    layers = [MoELayer(DIM, 4, 8, 2, router=DenseToSparse(kind="dense_to_sparse", until=0.8)) for _ in range(2)]
    controllers = [MoEController(layer, total_steps=10) for layer in layers]
    for _ in range(4):
        controllers[0].after_step()
    controllers[1].load_state_dict(controllers[0].state_dict())
    assert layers[0].router.temperature == layers[1].router.temperature == pytest.approx((2.0 * 0.3) ** 0.5)


def test_gumbel_noise_is_for_training_only_and_has_the_right_size():
    config = DenseToSparse(kind="dense_to_sparse", noise=True, start_temperature=1.0)
    router, x = build(config, 3, 1), torch.eye(1, DIM, dtype=torch.float64).expand(20_000, -1)
    expected = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    router.weight.data[:, 0] = expected.log()
    with torch.no_grad():
        assert_close(router(x).scores_TE[0], expected)
    assert_close(router.eval()(x).scores_TE[0], expected)
    chosen = router.train()(x).scores_TE.argmax(1)  # the Gumbel-max trick: with the frequency of the noiseless softmax
    assert_close(torch.bincount(chosen, minlength=3) / 20_000, expected, atol=0.02, rtol=0)


def test_relu_losses_equal_their_equations():
    torch.manual_seed(0)
    logits = torch.randn(2, SEQ_LEN, 4, dtype=torch.float64) / 50
    scores = logits.relu() / logits.relu().sum(-1, keepdim=True).clamp(min=1e-20)
    chunks = locality = 0.0
    for sequence in range(2):
        for first in range(0, SEQ_LEN, 3):
            members = range(first, min(first + 3, SEQ_LEN))
            idle = [math.prod(1 - scores[sequence, t, e].item() for t in members) for e in range(4)]
            chunks += len(members) * (1 - sum(idle) / 4)
        used = torch.sigmoid(100 * logits[sequence])
        pairs = zip(used[:-1].flatten().tolist(), used[1:].flatten().tolist(), strict=True)
        entropies = [-(right * math.log(left) + (1 - right) * math.log(1 - left)) for left, right in pairs]
        locality += SEQ_LEN * sum(entropies) / len(entropies)
    assert chunk_sparsity_loss(scores, 3).item() == pytest.approx(chunks)
    assert locality_loss(logits).item() == pytest.approx(locality)


def test_the_chunk_loss_presses_tokens_to_fewer_experts():
    config = ReluGate(kind="relu", chunk=7, chunk_loss=1.0, locality_loss=0.0)
    router, x = build(config, 8, 2), tokens(20 * SEQ_LEN) + 0.5
    optimizer = torch.optim.Adam([router.weight], lr=0.05)
    before = len(route(router, x).token_R)
    for _ in range(60):
        (router.penalty(route(router, x), SEQ_LEN) / len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(route(router, x).token_R) < 0.6 * before


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_relu_losses_of_hardly_any_tokens_are_finite(num_tokens):
    router = build(ReluGate(kind="relu"), 4, 2)
    penalty = router.penalty(route(router, tokens(num_tokens)), num_tokens)
    assert torch.isfinite(penalty)


@pytest.mark.parametrize(
    ("router", "num_experts", "top_k", "message"),
    [
        ("softmax_topk", 4, 5, "top_k = 5: must be between 1 and num_experts = 4"),
        ("hash", 4, 0, "top_k = 0: must be between 1"),
        ("sofmax_topk", 4, 2, "router = sofmax_topk: expected one of .* did you mean softmax_topk"),
        (3, 4, 2, "router = 3: expected a name, or a config"),
    ],
)
def test_impossible_routers_are_refused(router, num_experts, top_k, message):
    with pytest.raises(MoeError, match=message):
        build_router(router, DIM, num_experts, top_k)


def test_a_router_that_needs_settings_says_so():
    with pytest.raises(ConfigError, match="trace: missing"):
        build_router("replay", DIM, 4, 2)

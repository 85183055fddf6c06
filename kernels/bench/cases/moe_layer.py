"""One mixture-of-experts layer, forward and backward, in one process: over DeepSpeed's and Hugging Face's.

All hold the same weights (router and SwiGLU experts), drop no token, and agree on the output before they are timed;
each has a process of its own, with torch's own settings. fp32 and bf16 name the dtype of weights and activations; with
autocast, weights are float32 and products bf16. The note says what a call reaches of the matmul peak, and by how much
the bare matrix products of the experts, of the same shapes and into memory that is there, would beat the peer: no layer
that runs torch's products can be faster than that.

Hugging Face's batched_mm is left out: it copies the weights for every row, 34 GB of them here.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.cases.train_step import fastest
from bench.measure import seconds
from bench.registry import AtLeast, Bench, Row, Unavailable, case
from bench.workers import Step, Worker

if TYPE_CHECKING:
    from sparsetrain.moe import MoELayer

NUM_EXPERTS, TOP_K, DIM, FFN_DIM, TOKENS = 8, 2, 512, 2048, 2048
SHAPE = f"E{NUM_EXPERTS} k{TOP_K} d{DIM} f{FFN_DIM}, {TOKENS} tokens"
TARGETS = {"fp32": 1.15, "bf16": 1.3, "autocast": 1.3}


@case("moe_layer", f"MoE layer f+b, {SHAPE}: over DeepSpeed's and Hugging Face's")
def moe_layer(bench: Bench) -> Iterator[Row]:
    try:
        import deepspeed
        import transformers
    except ImportError as missing:
        raise Unavailable(f"{missing.name} is not installed") from missing
    for precision, bound in TARGETS.items():
        with ExitStack() as workers:

            def start(*args: Any, workers: ExitStack = workers) -> Worker:
                return workers.enter_context(Worker(*args, num_threads=bench.num_threads))

            ours = start(our_step, precision)
            implementations = {name: start(hugging_face_step, precision, name) for name in ("grouped_mm", "eager")}
            name, hugging_face = fastest(implementations)
            products = start(bare_products, precision)
            peers = {
                f"transformers {transformers.__version__}, {name}": hugging_face,
                f"deepspeed {deepspeed.__version__}": start(deepspeed_step, precision),
            }
            for peer_name, peer in peers.items():
                title = f"MoE layer {precision}"
                row = bench.compare(title, ours=ours, peer=peer, peer_name=peer_name, target=AtLeast(bound))
                yield _with_bounds(row, precision, products)


def our_step(precision: str) -> Step:
    """Our layer."""
    layer = _our_layer()
    return _step(layer, layer, precision)


def hugging_face_step(precision: str, implementation: str) -> Step:
    """Mixtral's, with one of its implementations of the experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=DIM, intermediate_size=FFN_DIM, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = implementation
    block, ours = MixtralSparseMoeBlock(config), _our_layer()
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(ours.experts.w_in)
        block.experts.down_proj.copy_(ours.experts.w_out)
    _assert_agree(block, ours)
    return _step(block, block, precision)


def deepspeed_step(precision: str) -> Step:
    """DeepSpeed's, without the noise that it adds to the choice of the second expert by default."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.moe.layer import MoE

    from sparsetrain.moe.feed_forward import FeedForward

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled for minutes, for one process
    meeting = os.path.join(tempfile.mkdtemp(), "meeting")
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    expert = FeedForward(DIM, FFN_DIM)
    moe = MoE(DIM, expert, NUM_EXPERTS, k=TOP_K, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False)
    moe.set_deepspeed_parallelism()
    ours = _our_layer()
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
        for index, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            gate, up = ours.experts.w_in[index].chunk(2)
            expert.gate.weight.copy_(gate)
            expert.up.weight.copy_(up)
            expert.down.weight.copy_(ours.experts.w_out[index])

    def output(x: Tensor) -> Tensor:
        y: Tensor = moe(x)[0]
        return y

    _assert_agree(output, ours)
    return _step(moe, output, precision)


def bare_products(precision: str) -> Step:
    """The matrix products of all experts, forward and backward, and nothing else; tokens spread evenly."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rows, in_dim = TOKENS * TOP_K // NUM_EXPERTS, 2 * FFN_DIM
    shapes = {"x": (rows, DIM), "h": (rows, in_dim), "a": (rows, FFN_DIM), "y": (rows, DIM)}
    shapes |= {"w_in": (in_dim, DIM), "w_out": (DIM, FFN_DIM), "dw_in": (in_dim, DIM), "dw_out": (DIM, FFN_DIM)}
    experts = [
        {name: torch.empty(shape, dtype=dtype).zero_() for name, shape in shapes.items()} for _ in range(NUM_EXPERTS)
    ]

    def step() -> None:
        for of in experts:
            torch.mm(of["x"], of["w_in"].mT, out=of["h"])
            torch.mm(of["a"], of["w_out"].mT, out=of["y"])
        for of in experts:
            torch.mm(of["y"], of["w_out"], out=of["a"])
            torch.mm(of["y"].mT, of["a"], out=of["dw_out"])
            torch.mm(of["h"].mT, of["x"], out=of["dw_in"])
            torch.mm(of["h"], of["w_in"], out=of["x"])

    return step


def _our_layer() -> "MoELayer":
    from sparsetrain.moe import MoELayer

    torch.manual_seed(0)
    return MoELayer(DIM, FFN_DIM, NUM_EXPERTS, TOP_K)


def _tokens() -> Tensor:
    return torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _assert_agree(layer: Callable[[Tensor], Tensor], ours: nn.Module) -> None:
    torch.testing.assert_close(layer(_tokens()), ours(_tokens()), rtol=1e-4, atol=1e-5)


def _step(module: nn.Module, output: Callable[[Tensor], Tensor], precision: str) -> Step:
    """Forward and backward by tokens, router and experts; gradients are forgotten afterwards."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module.to(dtype)
    x, dy = _tokens().to(dtype), _tokens().to(torch.float32 if precision == "fp32" else torch.bfloat16)

    def step() -> None:
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            y = output(leaf)
        y.backward(dy.to(y.dtype))
        module.zero_grad()

    return step


def _with_bounds(row: Row, precision: str, products: Step) -> Row:
    from sparsetrain.planning.hardware import measured_matmul_peak

    flops = 3 * 2 * TOKENS * TOP_K * 3 * DIM * FFN_DIM
    peak = measured_matmul_peak(torch.device("cpu"), torch.float32 if precision == "fp32" else torch.bfloat16)
    ours, peer = flops / median(row.ours), flops / median(row.peer)
    note = f"{SHAPE}; {ours / 1e9:.0f} GFLOP/s, {ours / peak:.0%} of a measured matmul peak of {peak / 1e9:.0f}"
    bare = min(seconds(products) for _ in range(len(row.ours) + 1))
    note += f"; the peer reaches {peer / peak:.0%}; bare products {bare * 1e3:.0f} ms, {median(row.peer) / bare:.2f}x"
    return replace(row, note=note)

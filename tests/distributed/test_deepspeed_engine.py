"""DeepSpeed's ZeRO against torch's own data parallelism: losses, norms, masks, experts, runs that change engines."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch.utils.cpp_extension
from sparsetrain_kernels import dispatch
from torch.distributed.tensor import DTensor

from sparsetrain.config import RunConfig
from sparsetrain.errors import ConfigError
from sparsetrain.models import Transformer
from sparsetrain.models.sparse_linear import PRODUCTS
from sparsetrain.parallel import join_world
from sparsetrain.planning.rank_bytes import rank_bytes
from sparsetrain.sharding import weight_shapes
from sparsetrain.testing import run_distributed
from sparsetrain.testing.parity import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    STEPS,
    Curve,
    Difference,
    build_engine,
    micro_batches,
    run_config,
    train_layout,
    train_layouts,
)
from sparsetrain.training import train
from tests.distributed.moving_runs import assert_same_run, beside, train_pieces
from tests.training_runs import rows_of, tiny_config, write_corpus

pytest.importorskip("deepspeed")

ZERO = ("torch, DDP", "deepspeed, ZeRO-1", "deepspeed, ZeRO-2", "deepspeed, ZeRO-3")
ON_TWO = [
    *((kind, tuple(LAYOUTS), STEPS) for kind in ("dense", "sparse", "moe")),
    ("moe", ("torch, DDP", *(name for name in EXPERT_LAYOUTS if name not in LAYOUTS)), 8),
    *((kind, ZERO, 8) for kind in ("recipe", "blocks")),
]
"""Kinds of models, layouts of each, steps."""
ON_FOUR = [
    ("dense", ("torch, DDP", "deepspeed, ZeRO-3"), 6),
    ("sparse", ZERO, 6),
    ("moe", ("torch, DDP", "torch, fully_shard", "deepspeed, ZeRO-2", "deepspeed, ZeRO-3, fssdp"), 6),
]

Trained = list[tuple[str, dict[str, Curve]]]


def train_all(plan: list[tuple[str, tuple[str, ...], int]]) -> Trained:
    """All in one group of processes, which take longer to start than to train; kernels leave out what is zero."""
    with contextlib.ExitStack() as forced:
        for product in PRODUCTS:
            forced.enter_context(dispatch.OPERATIONS[f"block_sparse_linear.{product}"].force("gather"))
        return [
            (kind, train_layouts(kind, {name: EXPERT_LAYOUTS[name] for name in names}, steps))
            for kind, names, steps in plan
        ]


def assert_alike(curves: dict[str, Curve]) -> None:
    reference = next(iter(curves.values()))
    for name, curve in curves.items():
        found = Difference.between(curve, reference)
        assert found.loss <= 1e-5, name
        assert found.grad_norm <= 1e-3, name
        assert found.same_masks, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_zero_stage_trains_as_torch_does_on_two_ranks() -> None:
    found: Trained = run_distributed(train_all, 2, ON_TWO, timeout_s=580)[0]

    for _, curves in found:
        assert_alike(curves)
    for kind in ("sparse", "moe", "recipe", "blocks"):
        curve = next(curves["deepspeed, ZeRO-3"] for name, curves in found if name == kind)
        assert len(set(curve.masks)) >= 3, f"the masks of {kind} did not move"
        assert curve.loss[-1] < curve.loss[0] - 0.1
        assert max(curve.grad_norm) > 0.5, "clipping had nothing to do"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks_train_alike() -> None:
    for _, curves in run_distributed(train_all, 4, ON_FOUR, timeout_s=580)[0]:
        assert_alike(curves)


def train_offloaded() -> dict[str, Curve]:
    """The device is the host here, so what is tested are the ways of gradients and weights, not where they lie."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    curves = train_layouts("sparse", {"torch, DDP": {}}, 6)
    for stage in (1, 2, 3):
        curves[f"ZeRO-{stage}"] = train_layout("sparse", {"engine": "deepspeed", "zero": stage}, 6, offload)
    return curves


def measure_held_bytes(layout: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the weights and of the moments that this rank holds after a step."""
    config = run_config("moe", layout)
    with join_world(config) as world:
        engine = build_engine(config, world)
        engine.forward_backward(micro_batches(0, world.rank, world.size))
        engine.step(1e-2)
        optimised = [p for group in engine.optimizer.param_groups for p in group["params"]]
        moments = [v for p in optimised for v in engine.optimizer.state[p].values() if v.dim()]
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        return bytes_of([*weights, *optimised]), bytes_of(moments)


def bytes_of(tensors: list[torch.Tensor]) -> int:
    whole = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in whole}.values())


SPREAD = {"experts": "ep"}
HELD = (
    {},
    {"shard": "full"},
    {"shard": "full", **SPREAD},
    *({"engine": "deepspeed", "zero": stage, **experts} for stage in range(4) for experts in ({}, SPREAD)),
)


def train_offloaded_and_measure() -> tuple[dict[str, Curve], list[tuple[int, int]]]:
    return train_offloaded(), [measure_held_bytes(layout) for layout in HELD]


@pytest.fixture(scope="module")
def offloaded_and_held() -> tuple[dict[str, Curve], list[tuple[int, int]]]:
    found: tuple[dict[str, Curve], list[tuple[int, int]]] = run_distributed(
        train_offloaded_and_measure, 2, timeout_s=300
    )[0]
    return found


@pytest.mark.timeout(600)
def test_an_offloaded_optimizer_trains_alike(offloaded_and_held: Any) -> None:
    assert_alike(offloaded_and_held[0])


@pytest.mark.timeout(600)
def test_a_rank_holds_as_many_bytes_as_are_planned(offloaded_and_held: Any) -> None:
    for layout, (weights, moments) in zip(HELD, offloaded_and_held[1], strict=True):
        config = run_config("moe", layout)
        with torch.device("meta"):
            planned = rank_bytes(config, 2, weight_shapes(Transformer(config.model, 64, 48)))
        assert weights == pytest.approx(planned.weights, rel=0.01), layout
        assert moments == pytest.approx(planned.optimizer, rel=0.01), layout


def test_difference_notices_a_mask_and_a_loss() -> None:
    curve = Curve((1.0, 2.0), (1.0, 1.0), (1, 2))

    assert Difference.between(Curve((1.0, 2.5), (1.0, 1.5), (1, 3)), curve) == Difference(0.5, 0.5, False)
    assert Difference.between(curve, curve) == Difference(0.0, 0.0, True)


# Whole runs: phases, evaluation, checkpoints

DEEPSPEED: dict[str, dict[str, Any]] = {
    "torch": {},
    "full": {"parallel__shard": "full"},
    **{f"zero-{stage}": {"parallel__engine": "deepspeed", "parallel__zero": stage} for stage in range(4)},
}


def config_of(folder: Path, layout: str, output: str, **changes: Any) -> RunConfig:
    often = {"checkpoint__keep": 20, "checkpoint__every_steps": 2}
    return tiny_config(folder, output=str(folder / output), **often, **DEEPSPEED[layout], **changes)


def train_stages(folder: Path, output: str, stages: list[tuple[str, int | None]]) -> None:
    train_pieces((config_of(folder, layout, output), step) for layout, step in stages)


SETTINGS = {"train__precision": "bf16", "train__activation_checkpointing": True}
MOVES = [("torch", 3), ("zero-3", 5), ("full", 7), ("zero-1", 9), ("zero-2", 11), ("torch", None)]


def train_runs(folder: Path) -> None:
    """A run that moves; what it has learned, gone on with in new runs; settings that do not change what is learned."""
    train_stages(folder, "run", MOVES)
    for layout in ("torch", "zero-3"):
        train(config_of(folder, layout, f"from-{layout}", train__init_from=str(folder / "run")))
        train(config_of(folder, layout, f"bf16-{layout}", **SETTINGS))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a whole run of one process on plain torch."""
    folder = tmp_path_factory.mktemp("engines")
    write_corpus(folder / "corpus")
    train_stages(folder, "run", [("torch", None)])
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(alone: Path) -> Path:
    folder = beside(alone, "two")
    run_distributed(train_runs, 2, folder, timeout_s=580)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_from_engine_to_engine_with_its_optimizer_state(alone: Path, on_two_ranks: Path) -> None:
    assert_same_run(on_two_ranks / "run", alone / "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_starts_from_another_ones_weights(on_two_ranks: Path) -> None:
    assert_same_run(on_two_ranks / "from-zero-3", on_two_ranks / "from-torch")
    first = {name: rows_of(on_two_ranks / name)[0]["loss"] for name in ("run", "from-zero-3")}
    assert first["from-zero-3"] < first["run"] - 0.5


def test_one_process_trains_on_deepspeed_twice_and_goes_on_with_torch(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiling(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("DeepSpeed compiles C++: a minute or more, and ranks may wait for ever on its lock")

    monkeypatch.setattr(torch.utils.cpp_extension, "load", compiling)
    folder = beside(alone, "one")
    train_stages(folder, "run", [("zero-2", 6), ("zero-3", 9), ("torch", None)])

    assert_same_run(folder / "run", alone / "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bf16_and_activation_checkpointing_compute_what_they_do_on_torch(on_two_ranks: Path) -> None:
    expected = [row["loss"] for row in rows_of(on_two_ranks / "bf16-torch")]
    assert [row["loss"] for row in rows_of(on_two_ranks / "bf16-zero-3")] == pytest.approx(expected, abs=5e-3)


def test_what_deepspeed_refuses_of_the_overrides_is_named() -> None:
    overrides = {"zero_optimization": {"not_a_key_of_deepspeed": 1}}
    with pytest.raises(ConfigError, match=r"engine_overrides\.deepspeed.*not_a_key_of_deepspeed"):
        train_layout("dense", {"engine": "deepspeed", "zero": 1}, 1, overrides)

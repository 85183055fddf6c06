"""DeepSpeed's ZeRO against torch's own data parallelism: losses, norms, masks, experts, runs that change engines."""

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.config import RunConfig
from sparsetrain.errors import ConfigError
from sparsetrain.testing import assert_close, run_distributed
from sparsetrain.testing.parity import Curve, Difference, available_layouts, train_layout, train_layouts
from sparsetrain.training import train
from tests.distributed.test_moe_training import short_samples
from tests.distributed.test_training import Interrupted, beside, saved_tensors, train_until
from tests.training_runs import rows_of, tiny_config, write_corpus

pytest.importorskip("deepspeed")

KINDS = ("dense", "sparse", "moe")


def train_kinds(kinds: tuple[str, ...], only: tuple[str, ...] = ()) -> dict[str, dict[str, Curve]]:
    """All kinds in one group of processes, which take longer to start than to train."""
    return {
        kind: train_layouts(
            kind, {name: parallel for name, parallel in available_layouts(kind).items() if not only or name in only}
        )
        for kind in kinds
    }


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
    found = run_distributed(train_kinds, 2, KINDS, timeout_s=580)[0]

    for kind in KINDS:
        assert len(found[kind]) == len(available_layouts(kind))
        assert_alike(found[kind])
    curve = found["sparse"]["deepspeed, ZeRO-3"]
    assert curve.loss[-1] < curve.loss[0] - 0.1
    assert len(set(curve.masks)) > 5, "the masks did not move"
    assert max(curve.grad_norm) > 0.5, "clipping had nothing to do"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks_train_alike() -> None:
    only = ("torch, DDP", "deepspeed, ZeRO-2", "deepspeed, ZeRO-3", "deepspeed, ZeRO-3, fssdp")
    found = run_distributed(train_kinds, 4, ("sparse", "moe"), only, timeout_s=580)[0]

    for curves in found.values():
        assert_alike(curves)


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


@short_samples()
def train_stages(folder: Path, output: str, stages: list[tuple[str, int]]) -> None:
    """Each stage trains one more piece of the same run; step 0 stands for the end."""
    for layout, step in stages:
        config = config_of(folder, layout, output)
        if step:
            with pytest.raises(Interrupted):
                train_until(config, step=step, on_existing="resume")
        else:
            train(config, on_existing="resume")


@short_samples()
def train_settings(folder: Path) -> None:
    """Settings that must not change what is learned."""
    changes = {"train__precision": "bf16", "train__activation_checkpointing": True}
    for layout in ("torch", "zero-3"):
        train(config_of(folder, layout, f"bf16-{layout}", **changes))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a whole run of one process on plain torch."""
    folder = tmp_path_factory.mktemp("engines")
    write_corpus(folder / "corpus")
    train_stages(folder, "run", [("torch", 0)])
    return folder


def assert_same_run(found: Path, wanted: Path) -> None:
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 1e-3), ("density", 0.0)):
        expected = [row[key] for row in rows_of(wanted)]
        assert [row[key] for row in rows_of(found)] == pytest.approx(expected, rel=tolerance), key
    ours, theirs = saved_tensors(found), saved_tensors(wanted)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer/") for key in theirs)
    for key, tensor in theirs.items():
        assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_from_engine_to_engine_with_its_optimizer_state(alone: Path) -> None:
    folder = beside(alone, "moving")
    stages = [("torch", 3), ("zero-3", 5), ("full", 7), ("zero-1", 9), ("zero-2", 11), ("torch", 0)]
    run_distributed(train_stages, 2, folder, "run", stages, timeout_s=580)

    assert_same_run(folder / "run", alone / "run")


def test_one_process_trains_on_deepspeed_twice_and_goes_on_with_torch(alone: Path) -> None:
    folder = beside(alone, "one")
    train_stages(folder, "run", [("zero-2", 6), ("zero-3", 9), ("torch", 0)])

    assert_same_run(folder / "run", alone / "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bf16_and_activation_checkpointing_compute_what_they_do_on_torch(alone: Path) -> None:
    folder = beside(alone, "settings")
    run_distributed(train_settings, 2, folder, timeout_s=580)

    expected = [row["loss"] for row in rows_of(folder / "bf16-torch")]
    assert [row["loss"] for row in rows_of(folder / "bf16-zero-3")] == pytest.approx(expected, abs=5e-3)


def test_what_deepspeed_refuses_of_the_overrides_is_named() -> None:
    overrides = {"zero_optimization": {"not_a_key_of_deepspeed": 1}}
    with pytest.raises(ConfigError, match=r"engine_overrides\.deepspeed.*not_a_key_of_deepspeed"):
        train_layout("dense", {"engine": "deepspeed", "zero": 1}, 1, overrides)

import multiprocessing
import os
import random
import resource
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sparsetrain.checkpoint import latest_checkpoint, list_checkpoints, load_weights, save_checkpoint, verify_checkpoint
from sparsetrain.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resumed_training_is_bitwise_the_same_as_uninterrupted_training(new_run):
    first = new_run()
    first.train_step()
    path = first.save(1)
    expected = [(first.train_step(), random.random()) for _ in range(3)]
    resumed = new_run(seed=99)
    checkpoint = resumed.load(path)
    assert checkpoint.step == 1
    assert [(resumed.train_step(), random.random()) for _ in range(3)] == expected


def test_weights_moments_masks_and_state_come_back_exactly(run, new_run):
    run.train_step()
    path = run.save(5, sparsifier={"step": 5, "cuts": (1, 2.5), 3: None}, note="ü")
    other = new_run(seed=1)
    checkpoint = other.load(path)
    assert checkpoint.state["sparsifier"] == {"step": 5, "cuts": (1, 2.5), 3: None}
    assert checkpoint.state["note"] == "ü"
    for mine, theirs in zip(run.shards, other.shards, strict=True):
        assert torch.equal(mine.local_weight(), theirs.local_weight())
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.local_moments()[key], theirs.local_moments()[key])
    assert checkpoint.masks.keys() == run.masks.keys()
    assert all(torch.equal(checkpoint.masks[name], mask) for name, mask in run.masks.items())


def test_hyperparameters_and_step_counts_come_back(run, new_run):
    run.train_step()
    run.optimizer.param_groups[0]["lr"] = 0.125
    other = new_run()
    other.load(run.save(1))
    assert other.optimizer.param_groups[0]["lr"] == 0.125
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert [state["step"].item() for state in other.optimizer.state.values()] == [1.0, 1.0, 1.0]


def test_a_checkpoint_from_before_the_first_step_resets_moments(run, new_run):
    path = run.save(0)
    other = new_run(seed=1)
    other.train_step()
    other.load(path)
    for shard in other.shards:
        assert not any(moment.any() for moment in shard.local_moments().values())
    assert all(state["step"].item() == 0 for state in other.optimizer.state.values())


def test_only_the_last_checkpoints_are_kept(run):
    for step in (10, 20, 30):
        run.save(step, keep=2)
    assert names(run.folder) == ["step-00000020", "step-00000030"]


def test_checkpoints_of_a_past_that_was_left_are_deleted(run):
    for step in (10, 20, 30):
        run.save(step, keep=9)
    run.save(15, keep=9)
    assert names(run.folder) == ["step-00000010", "step-00000015"]


def test_a_step_saved_again_replaces_the_older_one(run):
    run.save(10, keep=1, tokens=1)
    path = run.save(10, keep=1, tokens=2)
    assert list_checkpoints(run.folder) == [path]
    assert run.load(path).state["tokens"] == 2


def test_steps_are_ordered_as_numbers(run):
    for step in (99_999_999, 100_000_000):
        path = run.save(step)
    assert latest_checkpoint(run.folder) == path


def test_what_a_dead_save_left_is_ignored_and_then_cleared(run):
    path = run.save(10)
    leftover = run.folder / "step-00000020.tmp-0123abcd"
    shutil.copytree(path, leftover)
    assert latest_checkpoint(run.folder) == path
    run.save(20)
    assert names(run.folder) == ["step-00000010", "step-00000020"]


def test_a_crash_before_the_rename_leaves_the_previous_checkpoint_the_latest(run, monkeypatch):
    path = run.save(10)

    rename = Path.rename

    def rename_or_die(source: Path, target: Path) -> Path:
        if target.name == "step-00000020":
            os._exit(9)
        return rename(source, target)

    def save_and_die() -> None:
        monkeypatch.setattr(Path, "rename", rename_or_die)
        run.save(20)

    assert exit_code(save_and_die) == 9
    assert len(names(run.folder)) == 2  # the temporary folder is there, and complete but for its name
    assert latest_checkpoint(run.folder) == path


def exit_code(work) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(30)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.parametrize("room", [512, 4096], ids=["for nothing", "for the state but not for the tensors"])
def test_a_full_disk_is_one_error_and_leaves_earlier_checkpoints(run, room):
    path = run.save(10)
    assert (path / "state.pt").stat().st_size < 4096 < (path / "__0_0.distcp").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*Free space.*Earlier checkpoints are untouched"):
            run.save(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(run.folder) == ["step-00000010"]
    verify_checkpoint(path)


def test_a_folder_that_cannot_be_made_is_one_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    run.folder = tmp_path / "file" / "checkpoints"
    with pytest.raises(CheckpointError, match=r"Not a directory.*Set output"):
        run.save(10)


class Maker:
    """Of a kind that nobody has told torch to trust, as Megatron tells it of paths."""


def test_state_that_cannot_be_read_back_is_refused_when_saving(run):
    with pytest.raises(TypeError, match="plain values"):
        run.save(10, made_by=Maker())
    assert names(run.folder) == []


def test_no_checkpoint_is_none(run):
    assert latest_checkpoint(run.folder) is None


@pytest.mark.parametrize("where", ["run folder", "checkpoints", "checkpoint"])
def test_weights_alone_are_loaded_from_a_run_or_a_checkpoint(run, new_run, where):
    run.train_step()
    run.save(1)
    path = run.save(2)
    start = {"run folder": run.folder.parent, "checkpoints": run.folder, "checkpoint": path}[where]
    other = new_run(seed=1)
    torch_state = torch.get_rng_state()
    assert load_weights(start, other.shards) == path
    assert torch.equal(torch.get_rng_state(), torch_state)
    for mine, theirs in zip(run.shards, other.shards, strict=True):
        assert torch.equal(mine.local_weight(), theirs.local_weight())


def test_weights_from_nowhere_say_so(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such run folder or checkpoint"):
        load_weights(tmp_path / "nowhere", run.shards)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint"):
        load_weights(tmp_path, run.shards)


def test_another_shape_is_named(run, new_run):
    path = run.save(1)
    with pytest.raises(CheckpointError, match=r"another model.*0\.weight is \[5, 11\] there and \[6, 11\] here"):
        new_run(width=6).load(path)


def test_missing_and_unknown_weights_are_named(run, new_run):
    path = run.save(1)
    with pytest.raises(CheckpointError, match=r"unknown here: 0\.bias"):
        new_run(hidden_bias=False).load(path)
    smaller = new_run(hidden_bias=False).save(2)
    with pytest.raises(CheckpointError, match=r"missing in it: 0\.bias"):
        run.load(smaller)


def test_another_optimizer_is_named(run, new_run):
    run.train_step()
    path = run.save(1)
    other = new_run()
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(CheckpointError, match=r"0\.weight has the moments exp_avg, exp_avg_sq there and moment"):
        other.load(path)


def test_weights_pass_through_another_precision_without_losing_a_bit(run, new_run):
    """fp32 weights -> bf16 weights with an fp32 master -> fp32 weights."""
    mixed = new_run(seed=1)
    masters = {shard.name: shard.local_weight().clone() for shard in mixed.shards}
    mixed.model.bfloat16()
    mixed_shards = [replace(shard, master=partial(masters.get, shard.name)) for shard in mixed.shards]
    load_weights(run.save(1), mixed_shards)
    path = save_checkpoint(run.folder, 2, shards=mixed_shards, masks={}, state={}, keep=1)
    plain = new_run(seed=2)
    load_weights(path, plain.shards)
    for shard, original, back in zip(mixed_shards, run.shards, plain.shards, strict=True):
        assert torch.equal(shard.local_master(), original.local_weight())
        assert torch.equal(shard.local_weight(), original.local_weight().bfloat16())
        assert torch.equal(back.local_weight(), original.local_weight())

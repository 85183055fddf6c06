"""Training over ranks against training in one process: losses, norms, masks, weights and moments, in every layout."""

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.config import RunConfig
from sparsetrain.testing import run_distributed
from sparsetrain.training import train
from tests.distributed.moving_runs import Interrupted, assert_same_run, beside, train_until
from tests.training_runs import rows_of, tiny_config, write_corpus

LAYOUTS = {
    "alone": {},
    "ddp": {},
    "full": {"parallel__shard": "full"},
    "hybrid": {"parallel__shard": "full", "parallel__shard_size": 2},
}


def train_layouts(folder: Path, names: list[str]) -> None:
    for name in names:
        train(layout(folder, name))


def layout(folder: Path, name: str, **changes: Any) -> RunConfig:
    return tiny_config(folder, output=str(folder / name), checkpoint__keep=20, **LAYOUTS[name], **changes)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the run of one process on it."""
    folder = tmp_path_factory.mktemp("layouts")
    write_corpus(folder / "corpus")
    train(layout(folder, "alone"))
    return folder


@pytest.fixture(scope="module")
def two_ranks(one_process: Path) -> Path:
    """The same runs over two ranks."""
    return train_ranks(one_process, 2, ["ddp", "full"])


def train_ranks(folder: Path, world_size: int, names: list[str]) -> Path:
    ranked = beside(folder, str(world_size))
    run_distributed(train_layouts, world_size, ranked, names, timeout_s=280)
    return ranked


def test_two_ranks_train_as_one_process_does(one_process: Path, two_ranks: Path) -> None:
    assert_same_training(one_process, two_ranks, ["ddp", "full"])


@pytest.mark.slow
def test_four_ranks_train_as_one_process_does(one_process: Path) -> None:
    names = ["ddp", "full", "hybrid"]
    assert_same_training(one_process, train_ranks(one_process, 4, names), names)


def assert_same_training(one_process: Path, ranked: Path, names: list[str]) -> None:
    assert len(rows_of(one_process / "alone")) == 12
    for name in names:
        assert_same_run(ranked / name, one_process / "alone")


def train_interrupted(folder: Path, names: list[str]) -> None:
    """Every rank stops inside step 7, two steps after a checkpoint, as a group does when one of its processes dies."""
    for name in names:
        with pytest.raises(Interrupted):
            train_until(layout(folder, name), step=7)


def resume_layouts(folder: Path, names: list[str]) -> None:
    for name in names:
        train(layout(folder, name), on_existing="resume")


def test_interrupted_ranks_go_on_bitwise(one_process: Path, two_ranks: Path) -> None:
    broken, names = beside(one_process, "broken"), ["ddp", "full"]
    run_distributed(train_interrupted, 2, broken, names, timeout_s=280)
    run_distributed(resume_layouts, 2, broken, names, timeout_s=280)
    for name in names:
        for key in ("loss", "grad_norm", "density"):
            expected = [row[key] for row in rows_of(two_ranks / name)]
            assert [row[key] for row in rows_of(broken / name)] == expected, (name, key)


def test_a_run_goes_on_with_another_number_of_ranks_and_another_layout(one_process: Path) -> None:
    folder = beside(one_process, "moved")
    config = layout(folder, "ddp")
    with pytest.raises(Interrupted):
        train_until(config, step=7)
    run_distributed(resume_as_sharded, 2, folder, timeout_s=280)
    expected = [row["loss"] for row in rows_of(one_process / "alone")]
    assert [row["loss"] for row in rows_of(config.output)] == pytest.approx(expected, rel=2e-5)


def resume_as_sharded(folder: Path) -> None:
    config = layout(folder, "full").model_copy(update={"output": str(folder / "ddp")})
    train(config, on_existing="resume")

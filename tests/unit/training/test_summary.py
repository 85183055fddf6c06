import json
import math

import pytest

from sparsetrain.errors import RunFolderError
from sparsetrain.training.summary import PhaseSummary, RunSummary, StepTimes, measured_seconds_saved


def summary(**changes: object) -> RunSummary:
    phase = PhaseSummary(
        name="sparse",
        tokens=4096,
        steps=4,
        seconds=2.0,
        eval_before=8.1,
        eval_after=3.2,
        density=0.25,
        train_flops=6e9,
        executed_flops=9e9,
        dense_train_flops=9e9,
    )
    figures: dict[str, object] = {
        "final_loss": 2.1,
        "eval_loss": 2.2,
        "eval_bits_per_byte": 3.2,
        "tokens": 4096,
        "tokens_per_s": 2048.0,
        "mfu": 0.4,
        "density": 0.25,
        "n_avg": 1000.5,
        "train_flops": 6e9,
        "executed_flops": 9e9,
        "dense_train_flops": 9e9,
        "phases": (phase,),
    }
    return RunSummary(**{**figures, **changes})


def test_saved_summary_loads_equal(tmp_path):
    written = summary(sample="def f(): pass", bad_steps=2, resumed=True, seconds=2.0, seconds_saved=-0.1)
    written.save(tmp_path)
    assert RunSummary.load(tmp_path) == written
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_not_finite_loss_is_null(tmp_path):
    summary(final_loss=math.nan).save(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["final_loss"] is None
    assert RunSummary.load(tmp_path).final_loss is None


def test_flops_saved_is_nominal_share_of_dense():
    assert summary().flops_saved == pytest.approx(1 / 3)
    assert summary(dense_train_flops=0.0).flops_saved == 0.0


def test_every_missing_or_wrong_figure_is_named():
    content = summary().to_json()
    del content["n_avg"]
    content["phases"][0]["steps"] = "many"
    with pytest.raises(RunFolderError, match=r"phases\.0\.steps: .*; n_avg|n_avg: .*; phases\.0\.steps"):
        RunSummary.from_json(content)


def test_unfinished_run_says_so(tmp_path):
    with pytest.raises(RunFolderError, match=r"summary\.json: not there; the run has not finished"):
        RunSummary.load(tmp_path)


def test_damaged_summary_says_so(tmp_path):
    (tmp_path / "summary.json").write_text('{"final')
    with pytest.raises(RunFolderError, match="cannot be read"):
        RunSummary.load(tmp_path)


def rows(*steps: tuple[int, float, float]) -> list[dict[str, object]]:
    """Rows of metrics.jsonl from (batch tokens, density, seconds)."""
    tokens = 0
    result: list[dict[str, object]] = []
    for number, (batch, density, seconds) in enumerate(steps, start=1):
        tokens += batch
        result.append({"step": number, "tokens": tokens, "density": density, "step_time_s": seconds})
    return result


def test_step_times_compare_medians_of_equal_batches_and_count_mask_updates():
    dense = [(64, 1.0, 9.0), (64, 1.0, 1.0), (64, 1.0, 1.1), (64, 1.0, 1.2)]
    sparse = [(64, 0.5, 0.6), (64, 0.5, 0.6), (64, 0.25, 2.0)]
    other_batch = [(32, 1.0, 0.1), (32, 0.5, 0.1)]
    times = StepTimes.compare(rows(*dense, *sparse, *other_batch))
    assert times == StepTimes(dense_s=1.1, sparse_s=0.6, seconds_saved=pytest.approx(3 * 1.1 - 3.2))


@pytest.mark.parametrize(
    "steps",
    [[], [(64, 1.0, 1.0)], [(64, 0.5, 1.0)] * 3, [(64, 1.0, 1.0)] * 3],
    ids=["no-rows", "one-row", "only-sparse", "only-dense"],
)
def test_step_times_need_dense_and_sparse_steps(steps):
    assert StepTimes.compare(rows(*steps)) is None


@pytest.mark.parametrize(
    ("times", "executed_flops", "saved"),
    [
        (StepTimes(1.0, 0.9, 12.0), 8e9, 12.0),
        (StepTimes(1.0, 1.1, -12.0), 8e9, -12.0),
        (StepTimes(1.0, 0.9, 12.0), 1e10, 0.0),
        (None, 1e10, 0.0),
        (None, 8e9, None),
    ],
    ids=["faster", "slower", "noise-of-dense-kernels", "dense-kernels", "nothing-to-compare"],
)
def test_seconds_are_saved_only_where_kernels_skip_zeros(times, executed_flops, saved):
    assert measured_seconds_saved(times, executed_flops=executed_flops, dense_train_flops=1e10) == saved

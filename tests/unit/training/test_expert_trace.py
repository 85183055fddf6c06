from pathlib import Path

import pytest

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.training.expert_trace import TRACE_FILE, ExpertTrace


def test_a_trace_goes_on_after_the_checkpoint_that_a_run_resumes_from(tmp_path: Path) -> None:
    trace = ExpertTrace(tmp_path, top_k=2, resume_step=None)
    for step in (1, 2, 3):
        trace.append(step, [[step, 0]])
    trace.save()
    resumed = ExpertTrace(tmp_path, top_k=2, resume_step=2)
    resumed.append(3, [[7, 7]])
    resumed.save()

    found = LoadTrace.load(tmp_path / TRACE_FILE)
    assert found.step_N.tolist() == [1, 2, 3]
    assert found.load_NLE.tolist() == [[[1, 0]], [[2, 0]], [[7, 7]]]


def test_a_long_run_keeps_every_other_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.training.expert_trace._MAX_NUMBERS", 8)
    trace = ExpertTrace(tmp_path, top_k=2, resume_step=None)
    for step in range(1, 14):
        trace.append(step, [[step, 0]])
    trace.save()

    assert LoadTrace.load(tmp_path / TRACE_FILE).step_N.tolist() == [4, 8, 12]


def test_a_damaged_trace_is_told_with_the_way_on(tmp_path: Path) -> None:
    (tmp_path / TRACE_FILE).write_bytes(b"PK")
    with pytest.raises(PlacementError, match=r"expert_load\.npz is no load trace.*remove it to go on"):
        ExpertTrace(tmp_path, top_k=2, resume_step=5)

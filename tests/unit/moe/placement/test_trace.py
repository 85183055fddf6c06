"""Load traces: back as they were, whole or not at all, and only for their own model."""

import numpy as np
import pytest

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import LoadTrace, TraceRecorder


def recorded(by_source: bool = False) -> LoadTrace:
    recorder = TraceRecorder(top_k=2)
    generator = np.random.default_rng(0)
    for step in (3, 4, 8):
        load_LSE = generator.integers(0, 100, (2, 4, 5))
        recorder.append(step, load_LSE.sum(axis=1), load_LSE if by_source else None)
    return recorder.trace()


@pytest.mark.parametrize("by_source", [False, True], ids=["summed", "by source"])
def test_a_saved_trace_is_read_back_exactly(tmp_path, by_source):
    trace = recorded(by_source)
    path = tmp_path / "load"
    trace.save(path)
    read = LoadTrace.load(path)
    assert (read.num_layers, read.num_experts, read.top_k) == (2, 5, 2)
    assert read.step_N.tolist() == [3, 4, 8]
    np.testing.assert_array_equal(read.load_NLE, trace.load_NLE)
    if by_source:
        np.testing.assert_array_equal(read.load_NLSE, trace.load_NLSE)
    else:
        assert read.load_NLSE is None
    assert [file.name for file in tmp_path.iterdir()] == ["load"]


def test_what_was_saved_before_stays_when_saving_fails(tmp_path, monkeypatch):
    path = tmp_path / "load.npz"
    recorded().save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(PlacementError, match="No space left"):
        recorded(by_source=True).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["load.npz"]


def test_a_trace_of_another_model_is_refused():
    trace = recorded()
    trace.check_model(num_layers=2, num_experts=5, top_k=2)
    with pytest.raises(PlacementError, match="2 MoE layers of 5 experts with top_k 2, and this model has 2 of 8"):
        trace.check_model(num_layers=2, num_experts=8, top_k=2)
    with pytest.raises(PlacementError, match="with top_k 1"):
        trace.check_model(num_layers=2, num_experts=5, top_k=1)


def test_a_missing_trace_is_named(tmp_path):
    with pytest.raises(PlacementError, match=r"there is no load trace at .*nowhere"):
        LoadTrace.load(tmp_path / "nowhere.npz")


def test_any_flipped_byte_of_the_loads_is_noticed(tmp_path):
    path = tmp_path / "load.npz"
    recorded(by_source=True).save(path)
    whole = path.read_bytes()
    start = whole.index(b"load.npy") + len(b"load.npy") + 30  # inside the compressed loads
    for position in range(start, start + 40, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(PlacementError, match="is damaged"):
            LoadTrace.load(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], id="cut short"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: b"step,load\n0,1\n", id="another format"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, content):
    path = tmp_path / "load.npz"
    recorded().save(path)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(PlacementError, match="is no load trace, or is damaged"):
        LoadTrace.load(path)


def test_arrays_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.ones(3))
    with pytest.raises(PlacementError, match="is no load trace"):
        LoadTrace.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"step_N": np.arange(2)}, "does not go with", id="steps"),
        pytest.param({"load_NLE": -np.ones((1, 2, 3), dtype=int)}, "negative load", id="negative"),
        pytest.param({"top_k": 0}, "top_k below 1", id="top_k"),
        pytest.param({"load_NLSE": np.ones((1, 2, 4, 3), dtype=int)}, "do not sum", id="sources"),
    ],
)
def test_a_contradictory_trace_is_refused(arguments, message):
    good = {"step_N": np.arange(1), "load_NLE": np.ones((1, 2, 3), dtype=int), "top_k": 1}
    with pytest.raises(PlacementError, match=message):
        LoadTrace(**(good | arguments))


def test_a_recorder_with_no_step_or_half_of_the_sources_makes_no_trace():
    recorder = TraceRecorder(top_k=1)
    with pytest.raises(PlacementError, match="0 steps were recorded"):
        recorder.trace()
    recorder.append(0, [[2, 0]])
    recorder.append(1, [[1, 1]], [[[1, 0], [0, 1]]])
    with pytest.raises(PlacementError, match="2 steps were recorded, 1 of them by source"):
        recorder.trace()

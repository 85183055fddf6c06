import json
import math
from pathlib import Path

import pytest

from sparsetrain.errors import RunFolderError
from sparsetrain.training import metrics
from sparsetrain.training.events import EvalDone
from sparsetrain.training.metrics import (
    MetricsWriter,
    Throughput,
    finite_or_null,
    mfu,
    read_evals,
    read_metrics,
    truncate_metrics,
)


def row(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "phase": "main", "tokens": 64 * step, "loss": 1.0 / step, "lr": 1e-3, "density": 1.0, **more}


def evaluation(step: int, when: str = "during", phase: str = "main") -> EvalDone:
    return EvalDone(phase=phase, step=step, when=when, loss=math.log(8), bits_per_byte=3.0, num_tokens=640)


def write_run(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.step(row(step))
            if step % 2 == 0:
                writer.evaluation(evaluation(step))


def tensorboard_points(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def test_rows_read_back_as_written(tmp_path):
    rows = [row(1, loss=5.123456789012345), row(2, grad_norm=0.1, bad_steps=0)]
    with MetricsWriter(tmp_path, None) as writer:
        for each in rows:
            writer.step(each)
        assert read_metrics(tmp_path) == rows  # before it is closed: every row is flushed


def test_evaluations_read_back_with_perplexity(tmp_path):
    with MetricsWriter(tmp_path, None) as writer:
        writer.evaluation(evaluation(0, "start"))
    (read,) = read_evals(tmp_path)
    assert read.pop("perplexity") == pytest.approx(8.0)
    assert read == {
        "step": 0,
        "phase": "main",
        "when": "start",
        "loss": math.log(8),
        "bits_per_byte": 3.0,
        "tokens": 640,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_becomes_null_and_leaves_tensorboard_alone(tmp_path, value):
    with MetricsWriter(tmp_path, None) as writer:
        writer.step(row(1))
        writer.step(row(2, loss=value))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss"] is None
    assert tensorboard_points(tmp_path, "train/loss") == [(1, 1.0)]


def test_finite_or_null_reaches_into_containers():
    assert finite_or_null({"a": [1, math.nan], "b": (math.inf,)}) == {"a": [1, None], "b": [None]}


def test_tensorboard_holds_steps_and_evaluations_by_phase(tmp_path):
    write_run(tmp_path, range(1, 5))
    assert [step for step, _ in tensorboard_points(tmp_path, "train/tokens")] == [1, 2, 3, 4]
    assert tensorboard_points(tmp_path, "eval/main/bits_per_byte") == [(2, 3.0), (4, 3.0)]


def test_resumed_run_has_every_step_once(tmp_path):
    write_run(tmp_path, range(1, 8))
    write_run(tmp_path, range(5, 11), resume_step=4)
    assert [each["step"] for each in read_metrics(tmp_path)] == list(range(1, 11))
    assert [each["step"] for each in read_evals(tmp_path)] == [2, 4, 6, 8, 10]
    assert [step for step, _ in tensorboard_points(tmp_path, "train/loss")] == list(range(1, 11))


def test_restart_without_checkpoint_begins_anew(tmp_path):
    write_run(tmp_path, range(1, 4))
    write_run(tmp_path, range(1, 3))
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2]
    assert [step for step, _ in tensorboard_points(tmp_path, "train/loss")] == [1, 2]


def test_evaluation_repeated_by_a_resumed_run_is_kept_once(tmp_path):
    with MetricsWriter(tmp_path, None) as writer:
        writer.evaluation(evaluation(6, "end"))
        writer.evaluation(evaluation(6, "start", phase="finetune"))
    with MetricsWriter(tmp_path, 6) as writer:
        writer.evaluation(evaluation(6, "start", phase="finetune"))
        writer.evaluation(evaluation(9, "end", phase="finetune"))
    assert [(each["step"], each["when"]) for each in read_evals(tmp_path)] == [(6, "end"), (6, "start"), (9, "end")]


def test_torn_last_line_is_ignored_by_readers_and_removed_on_resume(tmp_path):
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3]
    write_run(tmp_path, range(4, 6), resume_step=3)
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_truncate_leaves_kept_lines_and_untouched_files_as_they_are(tmp_path):
    write_run(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    before, inode = path.read_text(), path.stat().st_ino
    truncate_metrics(tmp_path, 4)
    assert path.stat().st_ino == inode
    truncate_metrics(tmp_path, 2)
    assert path.read_text() == "".join(before.splitlines(keepends=True)[:2])
    assert {each.name for each in tmp_path.iterdir()} == {"metrics.jsonl", "evals.jsonl", "tensorboard"}


@pytest.mark.parametrize(
    "line", ["not json", "[1, 2]", '{"loss": 1.0}', "\ufffd"], ids=["text", "list", "no-step", "bytes"]
)
def test_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n" + line + "\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_run_that_has_not_begun_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_evals(tmp_path) == []


class FullDisk:
    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        pass


def test_full_disk_is_an_error_with_folder_and_fix(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer._metrics.close()
    writer._metrics = FullDisk()
    with pytest.raises(RunFolderError, match=r"No space left on device\. Free space") as caught:
        writer.step(row(1))
    assert str(tmp_path) in str(caught.value)
    writer.close()


def test_full_disk_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    write_run(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_text()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", refuse)
    with pytest.raises(RunFolderError, match="No space left"):
        truncate_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert not list(tmp_path.glob(".metrics*"))


def test_folder_that_is_a_file_is_an_error_with_its_name(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="run"):
        MetricsWriter(tmp_path / "run", None)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_pauses_out_and_forgets_old_steps():
    clock = Clock()
    meter = Throughput(window=2, clock=clock)
    assert meter.tokens_per_s == 0.0
    clock.now += 10.0
    assert meter.step_done(tokens=100, executed_flops=1000.0) == 10.0
    clock.now += 1.0
    with meter.paused():
        clock.now += 60.0
    clock.now += 1.0
    assert meter.step_done(tokens=100, executed_flops=1000.0) == 2.0
    assert meter.tokens_per_s == pytest.approx(200 / 12)
    clock.now += 2.0
    meter.step_done(tokens=100, executed_flops=1000.0)
    assert meter.tokens_per_s == pytest.approx(200 / 4)
    assert meter.executed_flops_per_s == pytest.approx(2000 / 4)
    assert (meter.total_tokens, meter.total_seconds, meter.total_executed_flops) == (300, 14.0, 3000.0)
    assert meter.mean_tokens_per_s == pytest.approx(300 / 14)


def test_mfu_is_executed_flops_over_what_the_peak_would_do():
    assert mfu(executed_flops=3e12, seconds=2.0, peak=5e12) == pytest.approx(0.3)
    assert mfu(executed_flops=0.0, seconds=0.0, peak=5e12) == 0.0

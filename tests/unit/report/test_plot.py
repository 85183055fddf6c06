import math

import numpy as np
import pytest
from matplotlib.image import imread

from sparsetrain.errors import RunFolderError
from sparsetrain.report import plot
from sparsetrain.report.plot import plot_loss, smooth


def drawn(folder):
    """The axes of a run's picture, before they become pixels."""
    return plot._draw(plot._read(folder)).axes


def colours(path) -> set[str]:
    pixels = (imread(path)[..., :3] * 255).round().astype(np.int64) @ [0x10000, 0x100, 1]
    return {f"#{colour:06X}" for colour in np.unique(pixels)}


def test_picture_of_two_phases_has_losses_evaluations_and_density(make_run):
    path = plot_loss(make_run(("sparse", 80), ("finetune", 40)))
    assert path.name == "loss.png"
    assert {plot._TRAIN, plot._HELD_OUT, plot._DENSITY, plot.SHADE} <= colours(path)


def test_picture_of_one_step_has_a_training_mark(make_run):
    path = plot_loss(make_run(("main", 1), evaluate=False))
    assert plot._TRAIN in colours(path)


def test_evaluations_stand_at_the_tokens_of_their_step_each_with_its_phase(make_run):
    losses, _ = drawn(make_run(("sparse", 80), ("finetune", 40)))
    marks = [line for line in losses.lines if line.get_color() == plot._HELD_OUT]
    assert [list(line.get_xdata()) for line in marks] == [[0, 64 * 80], [64 * 80, 64 * 120]]
    assert np.allclose(marks[1].get_ydata(), [5 * math.exp(-80 / 50), 5 * math.exp(-120 / 50)])
    last = [f"{5 * math.exp(-steps / 50) / math.log(2):.2f} bits/byte" for steps in (80, 120)]
    assert [text.get_text() for text in losses.texts] == ["sparse", last[0], "finetune", last[1]]


def test_density_has_its_own_axis_only_where_something_was_pruned(make_run):
    _, right = drawn(make_run(("sparse", 80), ("finetune", 40)))
    (line,) = right.lines
    assert sorted(set(line.get_ydata())) == [0.5, 1.0]
    assert len(drawn(make_run(("main", 10), dense=True))) == 1


def test_run_that_goes_on_is_drawn_anew(make_run):
    first = plot_loss(make_run(("main", 5))).read_bytes()
    assert plot_loss(make_run(("main", 50))).read_bytes() != first


def test_run_without_steps_has_nothing_to_draw(tmp_path):
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: no step yet"):
        plot_loss(tmp_path)


def test_full_disk_leaves_the_old_picture(make_run, monkeypatch):
    folder = make_run(("main", 5))
    before = plot_loss(folder).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot, "replace_file", refuse)
    with pytest.raises(RunFolderError, match=r"loss\.png: No space left on device"):
        plot_loss(folder)
    assert (folder / "loss.png").read_bytes() == before


def test_smoothing_neither_lags_nor_moves_a_straight_line():
    line = np.linspace(5.0, 1.0, 101)
    assert np.allclose(smooth(line, 10)[5:-5], line[5:-5])


def test_smoothing_leaves_out_what_is_not_finite():
    values = np.full(100, 2.0)
    values[[3, 50, 51]] = np.nan
    smoothed = smooth(values, 10)
    assert np.isnan(smoothed[3])  # too early for neighbours
    assert np.allclose(np.delete(smoothed, 3), 2.0)


@pytest.mark.parametrize("window", [0, 1], ids=str)
def test_window_of_one_changes_nothing(window):
    values = np.array([3.0, 1.0, 2.0])
    assert smooth(values, window).tolist() == values.tolist()

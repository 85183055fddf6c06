"""The picture of experts' load: what is at which place in it, and when there is none."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from sparsetrain.config import dump_config, load_config
from sparsetrain.errors import RunFolderError
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.report import expert_load
from sparsetrain.report.expert_load import plot_expert_load
from sparsetrain.training.expert_trace import TRACE_FILE

TOKENS = 4096


@pytest.fixture
def make_run(tmp_path):
    """A run folder with a recorded load, of steps as they are numbered and phases as they end."""

    def make(load_NLE, *, step_N=None, moe="{num_experts: 8}", num_layers=2, phase_ends=()):
        load_NLE = np.asarray(load_NLE)
        step_N = np.arange(1, len(load_NLE) + 1) if step_N is None else np.asarray(step_N)
        (tmp_path / "in.yaml").write_text(
            f"name: run\nmodel: {{dim: 8, num_layers: {num_layers}, num_heads: 2, moe: {moe}}}\n"
            "train: {tokens: 64Ki, batch_tokens: 4Ki}\n"
        )
        (tmp_path / "config.yaml").write_text(dump_config(load_config(tmp_path / "in.yaml")))
        rows = [
            {"step": step, "tokens": TOKENS * step, "phase": f"phase-{sum(step > end for end in phase_ends)}"}
            for step in range(1, int(step_N[-1]) + 1)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        LoadTrace(step_N, load_NLE, top_k=2).save(tmp_path / TRACE_FILE)
        return tmp_path

    return make


def drawn(folder):
    """The panels of a run's picture, before they become pixels."""
    return [axes for axes in expert_load._draw(expert_load._read(folder)).axes if axes.get_title(loc="left")]


def shares(panel):
    """Load over the mean as a panel's colours say it, [experts, columns]."""
    return 2.0 ** panel.collections[0].get_array()


def edges(panel):
    return panel.collections[0].get_coordinates()[0, :, 0].tolist()


def test_a_column_is_a_step_and_a_row_an_expert(make_run):
    load_E = np.array([2, 1, 1, 1, 1, 1, 1, 0])
    layers = drawn(make_run([[load_E, load_E[::-1]], [load_E, load_E]]))

    assert [axes.get_title(loc="left") for axes in layers] == ["layer 0", "layer 1"]
    assert np.allclose(shares(layers[0])[:7, 0], load_E[:7])
    assert np.allclose(shares(layers[1])[1:], np.stack([load_E[::-1], load_E], axis=1)[1:].clip(2**-4))
    assert edges(layers[0]) == [0, TOKENS, 2 * TOKENS]
    assert layers[0].get_ylim() == (7.5, -0.5)  # expert 0 on top
    assert layers[0].get_title(loc="right") == "max/mean 2.00 → 2.00"


def test_an_expert_without_tokens_is_below_the_scale_and_a_step_without_any_is_left_empty(make_run):
    load = np.zeros((2, 1, 8), dtype=np.int64)
    load[0, 0, :4] = 5
    (panel,) = drawn(make_run(load, num_layers=1))

    mesh = panel.collections[0]
    assert (mesh.get_array()[4:, 0] < mesh.norm.vmin).all()
    assert mesh.get_array().mask[:, 1].all()
    assert not mesh.get_array().mask[:, 0].any()
    assert panel.get_title(loc="right") == "max/mean 2.00 → 2.00"


def test_many_steps_become_columns_of_their_sums(make_run):
    num_steps = 2 * expert_load._MAX_COLUMNS
    load = np.ones((num_steps, 1, 8), dtype=np.int64)
    load[::2, 0, 3] = 3
    (panel,) = drawn(make_run(load, num_layers=1))

    assert shares(panel).shape == (8, expert_load._MAX_COLUMNS)
    assert np.allclose(shares(panel)[3], 2 / (9 / 8))
    assert edges(panel)[:2] == [0, 2 * TOKENS]


def test_steps_stand_at_their_tokens_where_some_were_not_recorded(make_run):
    load = np.ones((3, 1, 8), dtype=np.int64)
    (panel,) = drawn(make_run(load, step_N=[4, 8, 12], num_layers=1))

    assert edges(panel) == [0, 4 * TOKENS, 8 * TOKENS, 12 * TOKENS]


def test_layers_are_named_as_in_the_model_and_phases_above_the_first_row(make_run):
    moe = "{num_experts: 8, layers: {every: 2}}"
    layers = drawn(make_run(np.ones((4, 4, 8), dtype=np.int64), moe=moe, num_layers=8, phase_ends=(3,)))

    assert [axes.get_title(loc="left") for axes in layers] == ["layer 1", "layer 3", "layer 5", "layer 7"]
    assert [[text.get_text() for text in axes.texts] for axes in layers] == [["phase-0", "phase-1"]] * 2 + [[]] * 2
    assert [line.get_xdata()[0] for axes in layers for line in axes.lines] == [3 * TOKENS] * 4


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (5, 64), (33, 8)])
def test_every_size_of_model_becomes_a_picture(make_run, num_layers, num_experts):
    load = np.random.default_rng(0).integers(0, 50, (6, num_layers, num_experts))
    folder = make_run(load, moe=f"{{num_experts: {num_experts}}}", num_layers=num_layers)
    path = plot_expert_load(folder)

    assert path == folder / "expert_load.png"
    assert len(np.unique(imread(path)[::4, ::4, 0])) > 20
    layers = drawn(folder)
    assert len(layers) == min(num_layers, expert_load._MAX_PANELS)
    assert layers[-1].get_title(loc="left") == f"layer {num_layers - 1}"


def test_a_run_without_experts_has_no_such_picture(tmp_path):
    assert plot_expert_load(tmp_path) is None


def test_full_disk_leaves_the_old_picture(make_run, monkeypatch):
    folder = make_run(np.ones((2, 2, 8), dtype=np.int64))
    before = plot_expert_load(folder).read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(expert_load, "replace_file", refuse)
    with pytest.raises(RunFolderError, match=r"expert_load\.png: No space left on device"):
        plot_expert_load(folder)
    assert (folder / "expert_load.png").read_bytes() == before

from dataclasses import replace

import pytest

from sparsetrain.errors import RunFolderError
from sparsetrain.report.expert_load import LOAD_PLOT_FILE
from sparsetrain.report.final import print_summary
from sparsetrain.report.plot import PLOT_FILE
from sparsetrain.training.summary import ExpertSummary, SparseLayerSummary


def printed(folder, console) -> list[str]:
    print_summary(folder, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_table_has_each_phase_before_and_after(make_run, make_summary, console):
    folder = make_run(("sparse-pretrain", 20), ("dense-finetune", 10))
    make_summary().save(folder)
    lines = printed(folder, console)
    assert "phase tokens time held-out bits/byte density FLOPs saved" in lines
    assert "sparse-pretrain 4.00M 2:51 8.003 → 2.598 0.250 36.6 %" in lines
    assert "dense-finetune 1.02M 0:43 3.247 → 2.769 1.000 0.0 %" in lines
    # The path on the last line is as long as it is, and longer where tests run in a deep temporary folder.
    assert max(map(len, console.file.getvalue().replace(str(folder), "").splitlines())) <= 80


def test_masks_on_dense_kernels_save_no_seconds_and_say_so(make_run, make_summary, console):
    folder = make_run(("sparse-pretrain", 20), ("dense-finetune", 10))
    make_summary().save(folder)
    lines = printed(folder, console)
    assert "FLOPs saved, nominal 29.1 %: 73T of 103T FLOPs, zeros not counted" in lines
    assert "seconds saved, measured none: dense kernels multiply the zeros, too" in lines
    assert "median step 500 ms dense, 700 ms with zeros (same work, so noise)" in lines
    assert "speed 23.1k tokens/s, MFU 41.2 % of the measured peak" in lines
    assert "N_avg 1.81M non-zero linear parameters, mean over steps" in lines


def test_kernels_that_skip_zeros_show_measured_seconds(make_run, make_summary, console):
    folder = make_run(("sparse-pretrain", 20), ("dense-finetune", 10))
    make_summary(executed_flops=8e13, seconds_saved=-2.0).save(folder)
    lines = printed(folder, console)
    assert "seconds saved, measured -2.0 s: 3:34 of training instead of 3:32" in lines
    assert "median step 500 ms dense, 700 ms with zeros" in lines


def test_run_that_was_sparse_throughout_has_nothing_to_compare(tmp_path, make_summary, console):
    make_summary(executed_flops=8e13).save(tmp_path)
    lines = printed(tmp_path, console)
    assert "seconds saved, measured not known: this run has no dense steps to compare with" in lines
    assert not [line for line in lines if line.startswith("median step")]


def test_dense_run_saves_nothing(make_run, make_summary, console):
    folder = make_run(("main", 3), dense=True)
    make_summary(train_flops=1.03e14).save(folder)
    assert "seconds saved, measured none: no weight was zero" in printed(folder, console)


def test_experts_have_their_balance_traffic_and_active_parameters_told(make_run, make_summary, console):
    folder = make_run(("main", 3))
    experts = ExpertSummary(1.62, 1.08, replicas=7.5, moved_bytes=12.3e6, dropped_tokens=41)
    make_summary(parameters=46_700_000, active_parameters=12_900_000, experts=experts).save(folder)
    lines = printed(folder, console)
    assert "a token uses 12.9M of 46.7M parameters (28 %)" in lines
    assert "load, mean over steps fullest expert 1.62 x the mean, fullest rank 1.08 x" in lines
    assert "experts on the wire 12.3 MB a step for 7.50 replicas and new owners" in lines
    assert "dropped 41 assignments exceeded an expert's capacity" in lines


def test_what_experts_did_not_do_is_not_told(make_run, make_summary, console):
    folder = make_run(("main", 3))
    make_summary(experts=ExpertSummary(1.0, 1.0, 0.0, 0.0, 0)).save(folder)
    assert not [line for line in printed(folder, console) if line.startswith(("experts", "dropped", "a token uses"))]


def test_sample_is_shown_as_text_whatever_is_in_it(make_run, make_summary, console):
    folder = make_run(("main", 3))
    make_summary(sample="def f([red]x):\n\treturn\x1b[2J x\x07\n" + "line\n" * 30).save(folder)
    lines = printed(folder, console)
    assert "def f([red]x):" in lines
    assert "return�[2J x�" in lines
    assert lines.count("line") == 14
    assert "…" in lines


def test_missing_evaluations_are_dashes(make_run, make_summary, console):
    folder = make_run(("main", 3))
    summary = make_summary()
    phase = summary.phases[0]
    make_summary(phases=(type(phase)(**{**vars(phase), "eval_before": None, "eval_after": None}),)).save(folder)
    assert "sparse-pretrain 4.00M 2:51 – → – 0.250 36.6 %" in printed(folder, console)


@pytest.mark.parametrize("bad_steps", [0, 3])
def test_skipped_steps_are_told(make_run, make_summary, console, bad_steps):
    folder = make_run(("main", 3))
    make_summary(bad_steps=bad_steps).save(folder)
    told = "steps skipped 3, because loss or gradient was not finite" in printed(folder, console)
    assert told == (bad_steps > 0)


def test_last_lines_say_where_everything_is(make_run, make_summary, console):
    folder = make_run(("main", 3))
    make_summary().save(folder)
    assert printed(folder, console)[-1] == f"run folder {folder}"
    for name in (PLOT_FILE, LOAD_PLOT_FILE):
        (folder / name).touch()
    assert printed(folder, console)[-3:] == [
        f"run folder {folder}",
        f"losses {folder / PLOT_FILE}",
        f"load of experts {folder / LOAD_PLOT_FILE}",
    ]


def test_run_that_has_not_finished_says_so(make_run, console):
    with pytest.raises(RunFolderError, match=r"summary\.json: not there; the run has not finished"):
        print_summary(make_run(("main", 3)), console)


def test_what_sparse_attention_saves_is_told_apart_from_zeros(make_run, make_summary, console):
    folder = make_run(("main", 3), dense=True)
    make_summary(dense_train_flops=9e13, train_flops=9e13, attention_flops_saved=1e13).save(folder)
    (folder / "attention_layouts.png").touch()
    lines = printed(folder, console)
    assert "sparse attention saves 10.0 % of the 100T FLOPs with dense attention" in lines
    assert f"who sees what {folder / 'attention_layouts.png'}" in lines
    assert "seconds saved, measured none: no weight was zero" in lines


def test_sparse_layers_have_their_kernels_and_times_told(make_run, make_summary, console):
    sparse, dense = make_summary().phases
    row = SparseLayerSummary(
        "layers.*.ffn.up.weight", 4, (512, 128), "block[64,64]", 0.25, "gather", 0.012, 0.005, 0.75
    )
    unknown = replace(row, weights="layers.*.ffn.down.weight", dense_seconds=None, sparse_seconds=None)
    folder = make_run()
    make_summary(phases=(replace(sparse, sparse_layers=(row, unknown)), dense)).save(folder)
    lines = printed(folder, console)
    assert "zeros in sparse-pretrain pattern kernel dense chosen skipped" in lines
    assert "4 x layers.*.ffn.up block[64,64] gather 12 ms 5 ms 75.0 %" in lines
    assert "4 x layers.*.ffn.down block[64,64] gather – – 75.0 %" in lines

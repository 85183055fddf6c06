"""Whole runs in this process: they resume bitwise, skip what is not finite, and obey their config."""

import itertools
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.errors import ClusterError, ConfigError, RunFolderError, TrainingError
from sparsetrain.training import evaluate_run, generate_text, preflight, train
from sparsetrain.training.events import EvalDone, Event, Notice, PhaseStarted, RunFinished, RunStarted, StepDone
from tests.training_runs import losses_of, rows_of, tiny_config, write_corpus


class Interrupted(Exception):
    """Stands for whatever ends a process in the middle of a run."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path) -> Path:
    """A run that was never interrupted."""
    output = corpus / "finished"
    train(tiny_config(corpus, output=str(output)))
    return output


def interrupt_at(step: int) -> Any:
    def reporter(event: Event) -> None:
        if isinstance(event, StepDone) and event.row["step"] == step:
            raise Interrupted

    return reporter


@pytest.mark.parametrize("step", [3, 7, 8, 9, 11], ids=lambda step: f"step{step}")
def test_an_interrupted_run_goes_on_bitwise(corpus: Path, finished: Path, tmp_path: Path, step: int) -> None:
    config = tiny_config(corpus, output=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        train(config, reporter=interrupt_at(step))
    summary = train(config, on_existing="resume")
    oracle = json.loads((finished / "summary.json").read_text())
    assert losses_of(config.output) == losses_of(finished)
    for key in ("grad_norm", "density", "lr", "tokens"):
        assert [row[key] for row in rows_of(config.output)] == [row[key] for row in rows_of(finished)]
    assert (tmp_path / "run/evals.jsonl").read_text() == (finished / "evals.jsonl").read_text()
    for key in ("final_loss", "eval_loss", "density", "n_avg", "train_flops", "dense_train_flops", "sample", "tokens"):
        assert summary[key] == oracle[key], key
    # Before the first checkpoint there is nothing to go on from, and the run begins again.
    assert summary["resumed"] == (step > 5)


def test_a_finished_run_resumes_to_nothing_left_to_do(finished: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    events: list[Event] = []
    train(tiny_config(corpus, output=str(tmp_path / "run")), on_existing="resume", reporter=events.append)
    assert not any(isinstance(event, StepDone | EvalDone) for event in events)
    assert isinstance(events[-1], RunFinished)
    assert losses_of(tmp_path / "run") == losses_of(finished)


def test_a_finished_sparse_run_keeps_its_figures_when_it_is_resumed(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, output=str(tmp_path / "run"), train__phases=[])
    before = train(config)
    assert before["density"] == pytest.approx(0.25, abs=1e-3)
    assert before["phases"][0]["layer_density"].keys() >= {"layers.0.attention.q.weight", "layers.1.ffn.down.weight"}
    assert train(config, on_existing="resume") == {**before, "resumed": True}


def test_the_first_phase_sees_the_same_samples_whatever_follows(corpus: Path) -> None:
    alone, followed = (
        preflight(tiny_config(corpus, seed=5, **changes)).datasets for changes in ({"train__phases": []}, {})
    )
    assert alone[0].batch(0, 8).sample_ids.tolist() == followed[0].batch(0, 8).sample_ids.tolist()
    assert followed[0].batch(0, 8).sample_ids.tolist() != followed[1].batch(0, 8).sample_ids.tolist()


def test_a_port_in_use_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        meeting = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in meeting.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port}(.|\n)*Name a port"):
            train(tiny_config(corpus, output=str(tmp_path / "run")))


def test_an_existing_run_is_not_overwritten_unasked(finished: Path, corpus: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=r"step 12(.|\n)*--resume(.|\n)*--overwrite"):
        train(tiny_config(corpus, output=str(finished)))
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_events_tell_the_run_in_order(corpus: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    train(tiny_config(corpus, output=str(tmp_path / "run")), reporter=events.append)
    assert [event.name for event in events if isinstance(event, PhaseStarted)] == ["pretrain", "finetune"]
    evals = [(event.phase, event.step, event.when) for event in events if isinstance(event, EvalDone)]
    assert evals == [
        ("pretrain", 0, "start"),
        ("pretrain", 4, "during"),
        ("pretrain", 8, "end"),
        ("finetune", 8, "start"),
        ("finetune", 12, "end"),
    ]
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunFinished)


def test_zeroed_weights_learn_in_the_dense_phase(finished: Path) -> None:
    rows = rows_of(finished)
    assert rows[7]["density"] == pytest.approx(0.25, abs=1e-3)
    assert rows[8]["density"] == 1.0
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_kept_masks_stay_through_the_next_phase(corpus: Path, tmp_path: Path) -> None:
    phases = [{"name": "finetune", "tokens": 4 * 256, "optimizer_state": "keep"}]
    config = tiny_config(corpus, output=str(tmp_path / "run"), train__phases=phases)
    train(config)
    densities = [row["density"] for row in rows_of(config.output)]
    assert densities[7:] == [densities[7]] * 5
    assert densities[7] < 0.26


@pytest.mark.parametrize(
    "changes",
    [
        {"train__micro_batch_size": 3},
        {"train__micro_batch_size": 8},
        {"train__activation_checkpointing": True},
        {"parallel__shard": "full"},
    ],
    ids=["micro-batches of 3", "one micro-batch", "activation checkpointing", "fully sharded over one rank"],
)
def test_how_it_is_computed_does_not_change_what_is_learned(
    corpus: Path, finished: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tiny_config(corpus, output=str(tmp_path / "run"), **changes)
    train(config)
    assert losses_of(config.output) == pytest.approx(losses_of(finished), rel=2e-5)


def test_bf16_learns_nearly_the_same(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, output=str(tmp_path / "run"), train__precision="bf16")
    train(config)
    assert losses_of(config.output) == pytest.approx(losses_of(finished), rel=0.05)
    assert losses_of(config.output) != losses_of(finished)


def test_a_batch_ramp_trains_on_the_same_number_of_tokens(corpus: Path, tmp_path: Path) -> None:
    ramp = {"start_tokens": 64, "over": 0.5}
    config = tiny_config(corpus, output=str(tmp_path / "run"), train__batch_ramp=ramp, train__phases=[])
    train(config)
    tokens = [0] + [row["tokens"] for row in rows_of(config.output)]
    sizes = [later - earlier for earlier, later in itertools.pairwise(tokens)]
    assert sizes[0] == 64
    assert sizes[-1] == 256
    assert sizes == sorted(sizes)


def test_training_can_start_from_another_runs_weights(corpus: Path, finished: Path, tmp_path: Path) -> None:
    notices: list[Event] = []
    config = tiny_config(corpus, output=str(tmp_path / "run"), train__init_from=str(finished), sparsity=[])
    train(config, reporter=notices.append)
    first = next(event for event in notices if isinstance(event, EvalDone))
    assert first.loss < 5.0  # not the log(320) of fresh weights
    assert any(isinstance(event, Notice) and "step-00000012" in event.message for event in notices)


def test_losses_that_are_not_finite_are_skipped_and_then_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, output=str(tmp_path / "run"), optimizer__lr=1e30, train__max_bad_steps=2)
    with pytest.raises(
        TrainingError, match=r"3 steps had to be skipped(.|\n)*samples \d+, \d+(.|\n)* of phase pretrain"
    ):
        train(config)
    bad = [row for row in rows_of(config.output) if row.get("bad_steps")]
    assert len(bad) == 2
    assert bad[0]["loss"] is None or bad[0]["grad_norm"] is None


def test_a_profile_is_a_trace_of_the_early_steps(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, output=str(tmp_path / "run"), train__phases=[])
    train(config, profile=True)
    trace = json.loads((tmp_path / "run/profile/rank0.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_evaluating_a_run_repeats_its_last_figures(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    results = evaluate_run(finished)
    assert results.keys() == {"pretrain", "finetune"}
    assert results["finetune"].loss == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert results["finetune"].bits_per_byte == pytest.approx(summary["eval_bits_per_byte"], rel=1e-5)


def test_generation_is_repeatable_and_greedy_at_temperature_zero(finished: Path) -> None:
    text = generate_text(finished, "the of ", max_tokens=20, seed=3)
    assert text == generate_text(finished, "the of ", max_tokens=20, seed=3)
    assert text != generate_text(finished, "the of ", max_tokens=20, seed=4)
    greedy = {generate_text(finished, "the of ", max_tokens=8, temperature=0, seed=seed) for seed in (0, 1)}
    assert len(greedy) == 1


def test_a_run_ends_with_as_much_text_as_asked_for(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["sample"] == generate_text(finished, "", max_tokens=8) != ""


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"config\.yaml is missing"):
        generate_text(tmp_path, "x")


def test_preflight_finds_a_rule_that_matches_nothing(corpus: Path) -> None:
    rules = [{"params": "*.atention.*", "method": "static", "sparsity": 0.5}]
    with pytest.raises(ConfigError, match=r"atention(.|\n)*attention"):
        preflight(tiny_config(corpus, sparsity=rules))


def test_preflight_finds_a_phase_rule_that_matches_nothing(corpus: Path) -> None:
    rules = [{"params": "*.up_proj", "method": "static", "sparsity": 0.5}]
    phases = [{"name": "second", "tokens": 256, "sparsity": rules}]
    with pytest.raises(ConfigError, match=r"train\.phases\.0\.sparsity\.0"):
        preflight(tiny_config(corpus, train__phases=phases))


def test_preflight_finds_a_batch_that_the_ranks_cannot_share(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        preflight(tiny_config(corpus), world_size=3)

"""What is wrong with the values of a config, in the words that a person reads."""

import ast
import graphlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsetrain.config as config_module
from sparsetrain.config import (
    DataConfig,
    InvalidConfig,
    ModelConfig,
    Problem,
    PythonStdlib,
    RunConfig,
    SparsityRule,
    load_config,
    locate,
)
from sparsetrain.config.origin import FilePosition
from sparsetrain.config.problem import show
from sparsetrain.errors import ConfigError

Mistakes = Callable[..., list[str]]

RUN = """\
name: tiny
model:
  dim: 8
  num_layers: 1
  num_heads: 2
sparsity:
  - params: "*.ffn.*"
    method: prune
    sparsity: 0.5
    schedule: {kind: cubic}
data: {seq_len: 256}
optimizer: {lr: 6e-4}
train:
  tokens: 4Ki
  batch_tokens: 1Ki
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param("dim: 8", "dims: 8", "3: model.dims = 8: unknown key; did you mean dim?", id="misspelt"),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  lr: 3e-4",
            "15: train.lr = 0.0003: unknown key; did you mean optimizer.lr?",
            id="other-section",
        ),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  learning_rate: 1",
            "15: train.learning_rate = 1: unknown key; here it is called optimizer.lr",
            id="other-name",
        ),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  num_layer: 1",
            "15: train.num_layer = 1: unknown key; did you mean model.num_layers?",
            id="misspelt-and-other-section",
        ),
        pytest.param(
            "{seq_len: 256}",
            "{zzz: 1}",
            "11: data.zzz = 1: unknown key; known keys are source, tokenizer, seq_len, holdout, cache",
            id="unknown",
        ),
        pytest.param("name: tiny\n", "", "bad.yaml:1: name: missing (Names the run", id="missing-at-top"),
        pytest.param("  dim: 8\n", "", "2: model.dim: missing (Width of the residual stream)", id="missing"),
        pytest.param("name: tiny", "name: 12", '1: name = 12: expected text; put it in quotes ("...")', id="not-text"),
        pytest.param("name: tiny", "name: a/b", "1: name = a/b: may hold letters, digits and . _ - only", id="name"),
        pytest.param("name: tiny", "name: ..", "1: name = ..: may hold letters", id="name-of-dots"),
        pytest.param("num_heads: 2", "num_heads: two", "expected a whole number, without quotes", id="not-a-number"),
        pytest.param("num_heads: 2", "num_heads: true", "num_heads = true: expected a whole number", id="not-a-bool"),
        pytest.param("num_heads: 2", "num_heads: 0", "5: model.num_heads = 0: must be above 0", id="too-small"),
        pytest.param("lr: 6e-4", "lr: .inf", "12: optimizer.lr = .inf: expected a finite number", id="infinite"),
        pytest.param("lr: 6e-4", "lr: '6e-4'", "lr = 6e-4: expected a number, without quotes", id="quoted-number"),
        pytest.param("lr: 6e-4", "lr: true", "lr = true: expected a number", id="bool-for-a-number"),
        pytest.param("sparsity: 0.5", "sparsity: 1.0", "sparsity.0.sparsity = 1.0: must be below 1.0", id="too-large"),
        pytest.param(
            "tokens: 4Ki", "tokens: 4K", "14: train.tokens = 4K: unknown unit K; did you mean k or Ki?", id="unit"
        ),
        pytest.param(
            "tokens: 4Ki", "tokens: 4 apples", "unknown unit apples; units are k M B T Ki Mi Gi Ti", id="units"
        ),
        pytest.param(
            "tokens: 4Ki", "tokens: lots", "tokens = lots: expected a count such as 4096, 4M or 16Ki", id="not-a-count"
        ),
        pytest.param("tokens: 4Ki", "tokens: 0.5", "expected a whole number, and this is 0.5", id="half-a-token"),
        pytest.param("tokens: 4Ki", "tokens: .inf", "tokens = .inf: expected a count", id="endless-tokens"),
        pytest.param("tokens: 4Ki", "tokens: -4", "train.tokens = -4: must be above 0", id="negative-tokens"),
        pytest.param("tokens: 4Ki", "tokens:", "train.tokens = null: expected a count", id="no-value"),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  precision: fp16",
            "15: train.precision = fp16: expected one of bf16, fp32; did you mean bf16?",
            id="choice",
        ),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  compile: 3",
            "train.compile = 3: expected true or false",
            id="not-a-switch",
        ),
        pytest.param(
            "{kind: cubic}",
            "cubik",
            "10: sparsity.0.schedule = cubik: expected one of constant, cubic, geometric, stepwise; did you mean cubic",
            id="kind-in-short",
        ),
        pytest.param(
            "{kind: cubic}",
            "{kind: cubik}",
            "10: sparsity.0.schedule.kind = cubik: expected one of constant, cubic",
            id="kind",
        ),
        pytest.param(
            "{kind: cubic}", "{start: 0.1}", "sparsity.0.schedule.kind: missing; expected one of constant", id="no-kind"
        ),
        pytest.param(
            "{kind: cubic}",
            "{kind: cubic, begin: 0.1}",
            "10: sparsity.0.schedule.begin = 0.1: unknown key; known keys are start, end, every_steps, kind, initial",
            id="unknown-key-of-a-kind",
        ),
        pytest.param(
            "{kind: cubic}",
            "{kind: cubic, start: 0.9, end: 0.1}",
            "10: sparsity.0.schedule.start = 0.9: the window must begin before it ends, and end=0.1",
            id="window",
        ),
        pytest.param(
            "method: prune",
            "method: static",
            "sparsity.0.schedule: method=static has one mask from start to end; cubic needs",
            id="static-with-a-schedule",
        ),
        pytest.param(
            "    schedule: {kind: cubic}\n",
            "",
            "7: sparsity.0.schedule: method=prune needs one of: cubic, geometric, stepwise",
            id="prune-without-a-schedule",
        ),
        pytest.param(
            "{kind: cubic}",
            "{kind: stepwise, steps: [[0.2, 0.3], [0.1, 0.5]]}",
            "sparsity.0.schedule.steps = [[0.2, 0.3], [0.1, 0.5]]: [0.1, 0.5] must lie after and not below [0.2, 0.3]",
            id="steps-in-order",
        ),
        pytest.param(
            "{kind: cubic}",
            "{kind: stepwise, steps: [[0.2, 0.3]]}",
            "9: sparsity.0.sparsity = 0.5: schedule.steps ends at 0.3; make the two equal",
            id="steps-reach-sparsity",
        ),
        pytest.param("num_heads: 2", "num_heads: 3", "num_heads = 3: must divide dim=8; 2 and 4 do", id="heads"),
        pytest.param(
            "num_heads: 2", "num_heads: 4\n  num_kv_heads: 3", "must divide num_heads=4; 2 and 4 do", id="kv-heads"
        ),
        pytest.param("num_heads: 2", "num_heads: 8", "rotary embeddings need an even dim/num_heads", id="rope"),
        pytest.param("{seq_len: 256}", "{source: []}", "data.source = []: expected at least 1 value", id="no-source"),
        pytest.param(
            "{seq_len: 256}",
            "{source: [python-stdlib, {kind: text}]}",
            "11: data.source.1.paths: missing",
            id="source-in-a-list",
        ),
        pytest.param("{seq_len: 256}", "{source: {kind: text}}", "11: data.source.paths: missing", id="one-source"),
        pytest.param(
            "{seq_len: 256}", "256", "data = 256: expected a section, that is keys with values", id="not-a-section"
        ),
        pytest.param(
            "{seq_len: 256}", "", "data = null: has no value; write one or remove the key", id="empty-section"
        ),
        pytest.param(
            "{seq_len: 256}\n",
            "{seq_len: 256}\nparallel: {shard_size: 2}\n",
            "parallel.shard_size = 2: has no meaning with shard=ddp",
            id="shard-size-of-ddp",
        ),
        pytest.param(
            "{lr: 6e-4}", "{schedule: {kind: wsd, warmup: 0.9}}", "optimizer.schedule.decay: warmup=0.9", id="wsd"
        ),
        pytest.param("{lr: 6e-4}", "{betas: [0.9]}", "betas.1: missing, the list is too short", id="too-short"),
        pytest.param("{lr: 6e-4}", "{betas: [0.9, 0.9, 0.9]}", "expected at most 2 values", id="too-long"),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  batch_ramp: {start_tokens: 2Ki}",
            "15: train.batch_ramp.start_tokens = 2Ki: must be below batch_tokens=1024",
            id="ramp-above-batch",
        ),
        pytest.param(
            "  tokens: 4Ki",
            "  tokens: 4Ki\n  batch_ramp: {start_tokens: 768}",
            "start_tokens = 768: must divide batch_tokens=1024",
            id="ramp-divides",
        ),
        pytest.param(
            '"*.ffn.*"',
            '"*.ffn.*"\n    pattern: blocks',
            "pattern = blocks: expected unstructured, block[rows,cols], n:m or vector n:m, "
            "for example block[64,64], 2:4 or vector 1:4",
            id="pattern",
        ),
    ],
)
def test_a_wrong_value_is_told_with_line_key_value_and_fix(
    mistakes: Mistakes, old: str, new: str, expected: str
) -> None:
    assert old in RUN

    lines = mistakes(RUN.replace(old, new, 1))

    assert len(lines) == 1
    assert lines[0].startswith("bad.yaml")
    assert expected in lines[0]


def test_all_problems_are_told_at_once_in_the_order_of_the_file(mistakes: Mistakes) -> None:
    text = RUN.replace("dim: 8", "dim: 9").replace("seq_len: 256", "seqlen: 256").replace("1Ki", "1000", 1)
    text = (
        text.replace("lr: 6e-4", "lr: 0").replace("name: tiny", "name: tiny\nname: other") + "cluster: {workers: 3}\n"
    )

    lines = mistakes(text, "train.colour=red")

    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "name",
        "model.num_heads = 2",
        "data.seqlen = 256",
        "optimizer.lr = 0",
        "unknown key; known keys are tokens, batch_tokens, micro_batch_size, batch_ramp, precision, compile, "
        "activation_checkpointing, eval_every_steps, eval_tokens, sample_tokens, max_bad_steps, init_from, upcycle, "
        "phase_name, phases",
    ]


def test_sections_are_checked_against_each_other_even_where_another_is_broken(mistakes: Mistakes) -> None:
    lines = mistakes(RUN.replace("dim: 8", "dim: 9").replace("lr: 6e-4", "lr: 0").replace("1Ki", "1000"))

    assert len(lines) == 3
    assert "model.num_heads" in lines[0]
    assert "optimizer.lr" in lines[1]
    assert "train.batch_tokens = 1000: must be a multiple of data.seq_len=256; 768 or 1024 would do" in lines[2]


def test_a_section_that_is_broken_beyond_repair_does_not_hide_the_rest(mistakes: Mistakes) -> None:
    lines = mistakes("model: {namedim: 8, num_heads: 0}\ntrain: {tokens: 1Ki, batch_tokens: 1000}\n")

    assert [line.split(": ")[1] for line in lines] == [
        "name",
        "model.num_layers",
        "model.num_heads = 0",
        "model.namedim = 8",
        "train.batch_tokens = 1000",
    ]


def test_what_follows_from_a_mistake_is_not_told(mistakes: Mistakes) -> None:
    """Without the misspelt key the rule would have no schedule, and the run no batch."""
    lines = mistakes(RUN.replace("schedule:", "shedule:").replace("batch_tokens:", "batch_token:"))

    assert [line.rpartition("; ")[2] for line in lines] == ["did you mean schedule?", "did you mean batch_tokens?"]


def test_a_phase_inherits_what_it_does_not_say_and_its_mistakes_are_told_where_they_were_written(
    mistakes: Mistakes,
) -> None:
    phases = "  phases:\n    - {name: second, tokens: 1Ki, data: {holdout: 2.0}}\n"

    lines = mistakes(RUN.replace("{seq_len: 256}", "{seq_len: 256, tokenizer: {kind: bpe, vocab_size: 3}}") + phases)

    assert lines == [
        "bad.yaml:11: data.tokenizer.vocab_size = 3: must be at least 258",
        "bad.yaml:17: train.phases.0.data.holdout = 2.0: must be below 1.0",
    ]


def test_phases_are_completed_from_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        RUN.replace("{lr: 6e-4}", "{lr: 6e-4, grad_clip: 2.0, schedule: wsd}") + "  phases:\n"
        "    - {name: same, tokens: 1Ki}\n"
        "    - name: other\n"
        "      tokens: 1Ki\n"
        "      sparsity: []\n"
        "      data: {source: {part: prose}}\n"
        "      optimizer: {grad_clip: null, schedule: {warmup: 0.5}}\n",
    )

    config = load_config(path, ["data.source=python-stdlib"])

    first, same, other = config.phases
    assert (same.data, same.optimizer, same.sparsity) == (first.data, first.optimizer, "keep")
    assert other.sparsity == ()
    assert other.data.source[0].model_dump() == {"kind": "python-stdlib", "part": "prose", "weight": 1.0}
    assert (other.optimizer.lr, other.optimizer.grad_clip) == (6e-4, None)
    assert (other.optimizer.schedule.kind, other.optimizer.schedule.warmup) == ("wsd", 0.5)


def test_a_phase_that_changes_the_kind_of_a_section_takes_nothing_from_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        RUN.replace("{lr: 6e-4}", "{schedule: {kind: cosine, final: 0.5}}")
        + "  phases: [{name: b, tokens: 1Ki, optimizer: {schedule: {kind: linear}}}]\n"
    )

    assert load_config(path).phases[1].optimizer.schedule.final == 0.1


@pytest.mark.parametrize(
    ("run", "phase", "expected"),
    [
        ("{schedule: {warmup: 0.3}}", "{schedule: {kind: cosine}}", ("cosine", 0.3, 0.1)),
        ("{schedule: {warmup: 0.3}}", "{schedule: {final: 0.5}}", ("cosine", 0.3, 0.5)),
        ("{schedule: {warmup: 0.3}}", "{schedule: {kind: linear}}", ("linear", 0.02, 0.1)),
        ("{schedule: {kind: linear, warmup: 0.3}}", "{schedule: {kind: cosine}}", ("cosine", 0.02, 0.1)),
        ("{lr: 1.0}", "{schedule: {warmup: 0.3}}", ("cosine", 0.3, 0.1)),
    ],
)
def test_a_kind_that_the_run_leaves_out_is_its_default(
    tmp_path: Path, run: str, phase: str, expected: tuple[str, float, float]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        RUN.replace("{lr: 6e-4}", run) + f"  phases: [{{name: b, tokens: 1Ki, optimizer: {phase}}}]\n",
    )

    schedule = load_config(path).phases[1].optimizer.schedule

    assert (schedule.kind, schedule.warmup, schedule.final) == expected


@pytest.mark.parametrize("source", ["", "source: python-stdlib", "source: [{kind: python-stdlib}]"])
def test_a_phase_changes_a_part_of_the_one_source(tmp_path: Path, source: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        RUN.replace("{seq_len: 256}", f"{{{source}}}")
        + "  phases: [{name: b, tokens: 1Ki, data: {source: {part: prose}}}]\n"
    )

    (of_run,), (of_phase,) = (phase.data.source for phase in load_config(path).phases)

    assert of_run == PythonStdlib()
    assert of_phase == PythonStdlib(part="prose")


def test_a_kind_that_must_be_written_is_missed_once_and_in_the_run(mistakes: Mistakes) -> None:
    phases = "  phases: [{name: b, tokens: 1Ki}]\n"

    (line,) = mistakes(RUN.replace("{seq_len: 256}", "{tokenizer: {vocab_size: 512}}") + phases)

    assert line.startswith("bad.yaml:11: data.tokenizer.kind: missing; expected one of")


def test_output_follows_the_name(smallest: Path) -> None:
    assert load_config(smallest).output == "runs/tiny"
    assert load_config(smallest, ["output=elsewhere"]).output == "elsewhere"


def test_a_problem_keeps_the_text_it_points_at(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(RUN.replace("num_heads: 2", "num_head: 2"))

    with pytest.raises(InvalidConfig) as caught:
        load_config(path)

    (problem,) = caught.value.problems
    assert isinstance(problem.where, FilePosition)
    where = problem.where
    assert where.source_line[where.column - 1 :][: where.width] == "num_head"


def test_sections_made_in_python_explain_themselves_too() -> None:
    with pytest.raises(InvalidConfig) as rule:
        SparsityRule(params="*.ffn.*", method="prunee", sparsity=2)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"source\.0: expected a section"):
        DataConfig(source=[object()])  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"num_heads = 3: must divide dim=8"):
        ModelConfig(dim=8, num_layers=1, num_heads=3)

    assert str(rule.value).splitlines() == [
        "SparsityRule has 2 problems",
        "",
        "method = prunee: expected one of static, prune, ste, sr_ste, mdgf, sdgf, bdwp, transposable; "
        "did you mean prune?",
        "sparsity = 2: must be below 1.0",
    ]


def test_an_error_survives_the_way_from_a_worker(smallest: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config(smallest, ["model.num_head=3", "seed=-1"])

    again = pickle.loads(pickle.dumps(caught.value))

    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def test_a_later_check_is_told_where_its_keys_stand(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    here = Problem(("sparsity", 0, "params", 0), "matches nothing", value="*.ffn.*")
    there = Problem(("model", "dim"), "too wide", value=16)

    located = locate(InvalidConfig("run", [there, here]), path, ["model.dim=16"])

    assert str(located).replace(str(path), "run.yaml").splitlines() == [
        "run.yaml has 2 problems",
        "",
        "run.yaml:7: sparsity.0.params.0 = '*.ffn.*': matches nothing",
        "override model.dim=16: too wide",
    ]


def test_values_are_shown_on_one_short_line() -> None:
    assert show({"kind": "erk", "x": [1, None]}) == "{kind: erk, x: [1, null]}"
    assert show("two\nlines") == '"two\\nlines"'
    assert show("a" * 100) == "a" * 45 + "..."
    assert show([object]).startswith("[<class 'object'>")


def test_a_run_made_in_python_completes_its_phases(smallest: Path) -> None:
    config = load_config(smallest, ["data.seq_len=128", "train.phases=[{name: b, tokens: 1Ki}]"])

    again = RunConfig(
        name="tiny",
        model=config.model,
        data=config.data,
        train={"tokens": 4096, "batch_tokens": 1024, "phases": [{"name": "b", "tokens": 1024}]},  # type: ignore[arg-type]
    )

    assert again == config


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_a_file_it_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    values = st.sampled_from(
        ["", "null", "-1", ".nan", "[]", "[1]", "{}", "{kind: erk}", "*a", "&a 1", "'", "1e999", "keep"]
    )
    lines = RUN.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        line = data.draw(st.integers(0, len(lines) - 1))
        key = lines[line].split(":")[0]
        lines[line] = data.draw(st.just("") | st.just("  " + lines[line]) | st.builds(f"{key}: {{}}".format, values))
    path = tmp_path / "any.yaml"
    path.write_text("\n".join(lines))
    keys = st.sampled_from(
        ["seed", "model", "sparsity.0", "sparsity.0.schedule", "train.phases", "data.source.0", "a.b"]
    )
    overrides = data.draw(st.lists(st.builds("{}={}".format, keys, values), max_size=2))

    try:
        config = load_config(path, overrides)
    except ConfigError:
        return
    assert config.train.batch_tokens % config.data.seq_len == 0


def test_config_modules_import_each_other_in_one_direction() -> None:
    """Imports inside functions count, and so do those for type checkers."""
    folder = Path(config_module.__file__).parent
    imports = {
        f"sparsetrain.config.{file.stem}": {
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and file.stem != "__init__"
        }
        for file in folder.glob("*.py")
    }
    ours = {name: modules & imports.keys() for name, modules in imports.items()}

    assert "sparsetrain.config.base" in set(graphlib.TopologicalSorter(ours).static_order())


def test_reading_a_config_does_not_import_torch(smallest: Path) -> None:
    code = f"import sys, sparsetrain as st; st.load_config({str(smallest)!r}); print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

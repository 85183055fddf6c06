"""The command line: what it hands on, what it says, and how it ends."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from typer.testing import CliRunner

import sparsetrain
from sparsetrain.cli import app, main
from sparsetrain.config import RunConfig, load_config
from sparsetrain.errors import DataError, RunFolderError
from sparsetrain.training.events import Notice, RunStarted

RUN = """\
name: tiny
model: {dim: 8, num_layers: 1, num_heads: 2}
data: {seq_len: 256}
train: {tokens: 4Ki, batch_tokens: 1Ki}
"""


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RUN)
    return str(path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Put a stand-in with the same signature in the place of a function."""

    def put(target: str, **behaviour: Any) -> Any:
        module, _, name = target.rpartition(".")
        real = getattr(__import__(module, fromlist=[name]), name)
        double = create_autospec(real, **behaviour)
        assert inspect.signature(double) == inspect.signature(real)
        monkeypatch.setattr(target, double)
        return double

    return put


@pytest.fixture
def training(stand_in: Callable[..., Any]) -> dict[str, Any]:
    """Everything that `train` calls, without its work."""
    return {
        "preflight": stand_in("sparsetrain.training.preflight"),
        "train": stand_in("sparsetrain.training.train"),
        "run_on_ray": stand_in("sparsetrain.cluster.run_on_ray"),
        "plot_loss": stand_in("sparsetrain.report.plot.plot_loss"),
        "print_summary": stand_in("sparsetrain.report.final.print_summary"),
    }


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_train_goes_through_ray_by_default(config: str, training: dict[str, Any]) -> None:
    result = run("train", config, "train.tokens=2M", "--address", "10.0.0.1:6379", "--resume", "--profile")

    assert result.exit_code == 0, result.output
    (handed,), options = training["run_on_ray"].call_args
    assert handed == load_config(config, ["train.tokens=2M"])
    assert options.pop("reporter") is not None
    assert options == {"address": "10.0.0.1:6379", "on_existing": "resume", "profile": True}
    training["train"].assert_not_called()
    training["preflight"].assert_not_called()  # the driver does that, once it knows that there is room


def test_train_in_process_needs_no_ray(config: str, training: dict[str, Any]) -> None:
    result = run("train", config, "--in-process", "--overwrite", "cluster.workers=2")

    assert result.exit_code == 0, result.output
    assert "note: --in-process is one rank; cluster.workers = 2 is not used" in result.output
    training["run_on_ray"].assert_not_called()
    assert training["train"].call_args.kwargs["on_existing"] == "overwrite"
    assert training["preflight"].call_args.kwargs["world_size"] == 1


def test_a_rank_of_torchrun_trains_here_and_only_the_first_shows_it(
    config: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    reporters = []
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        assert run("train", config).exit_code == 0
        reporters.append(training["train"].call_args.kwargs["reporter"])
        assert training["preflight"].call_args.kwargs["world_size"] == 4

    assert reporters[0] is not None
    assert reporters[1] is None
    training["run_on_ray"].assert_not_called()


def test_a_mistake_is_told_by_the_first_rank_only(
    config: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training["preflight"].side_effect = DataError("the corpus is empty")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    for arguments in ([config], [config, "seed=-1"]):
        result = run("train", *arguments)
        assert (result.exit_code, result.output) == (2, "")
    monkeypatch.setenv("RANK", "0")
    result = run("train", config)
    assert (result.exit_code, result.output) == (2, "error: the corpus is empty\n")


def test_what_goes_wrong_on_one_rank_names_it(
    config: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training["train"].side_effect = DataError("a shard is cut short")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    result = run("train", config)

    assert (result.exit_code, result.output) == (2, "error (rank 1): a shard is cut short\n")


def test_the_number_of_ranks_under_torchrun_is_checked_at_once(
    config: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")

    result = run("train", config)

    assert result.exit_code == 2
    assert "which 3 ranks cannot share evenly" in result.output
    training["preflight"].assert_not_called()


def test_the_table_at_the_end_is_of_the_folder_that_the_run_named(
    config: str, training: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text("{}")

    def work(run: RunConfig, *, reporter: Callable[[Any], None], **_: Any) -> dict[str, Any]:
        reporter(Notice("hello"))
        reporter(RunStarted("tiny", str(tmp_path), 1, 1, 1, "cpu", 1e9))
        return {}

    training["run_on_ray"].side_effect = work

    result = run("train", config)

    assert result.exit_code == 0, result.output
    assert "hello" in result.output
    training["plot_loss"].assert_called_once_with(tmp_path)
    assert training["print_summary"].call_args.args[0] == tmp_path


def test_print_config_prints_what_loads_again(config: str, tmp_path: Path, training: dict[str, Any]) -> None:
    result = run("train", config, "optimizer.lr=1e-3", "--print-config")

    again = tmp_path / "again.yaml"
    again.write_text(result.output)
    assert result.exit_code == 0
    assert load_config(again) == load_config(config, ["optimizer.lr=1e-3"])
    training["preflight"].assert_not_called()


def test_a_bad_yaml_shows_the_lines_to_mend(config: str) -> None:
    Path(config).write_text(RUN.replace("num_heads", "num_head").replace("seq_len: 256", "seq_len: yes"))

    result = run("train", config, "train.tokns=3")

    assert result.exit_code == 2
    assert result.output.splitlines() == [
        f"error: {config} has 3 problems",
        f"{config}:2: model.num_head = 2: unknown key; did you mean num_heads?",
        "    2 | model: {dim: 8, num_layers: 1, num_head: 2}",
        "      |                                ^^^^^^^^",
        f"{config}:3: data.seq_len = 'yes': expected a count such as 4096, 4M or 16Ki",
        "    3 | data: {seq_len: yes}",
        "      |        ^^^^^^^",
        "override train.tokns=3: unknown key; did you mean tokens?",
    ]


def test_many_problems_are_a_line_each(config: str) -> None:
    Path(config).write_text(RUN + "".join(f"colour{n}: red\n" for n in range(11)))

    result = run("train", config)

    assert len(result.output.splitlines()) == 12


def test_a_rule_that_matches_nothing_is_told_with_its_line(config: str, stand_in: Callable[..., Any]) -> None:
    """Only the model knows the names; the check is made on the meta device, before training starts."""
    training = stand_in("sparsetrain.training.train")
    Path(config).write_text(
        RUN + 'sparsity:\n  - params: ["*.ffn.*", "*.atention.*"]\n    method: static\n    sparsity: 0.5\n'
    )

    result = run("train", config, "--in-process")

    assert result.exit_code == 2
    assert f"{config}:6: sparsity.0.params.1 = '*.atention.*': matches no parameter; the nearest" in result.output
    assert "      |                         ^^^^^^^^^^^^^^" in result.output
    training.assert_not_called()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no.yaml"], "error: no.yaml does not exist"),
        (
            ["train", "train.tokens=2M", "no.yaml"],
            "the YAML file comes first, then changes to it such as train.tokens=2M",
        ),
        (
            ["train", "no.yaml", "--resume", "--overwrite"],
            "--resume keeps what --overwrite deletes; give one of the two",
        ),
        (["train", "no.yaml", "--in-process", "--address", "auto"], "--in-process and torchrun use no Ray"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "no.yaml", "--nonsense"], "No such option"),
        (["trian"], "Did you mean 'train'?"),
        (["generate", "runs/x"], "Missing option '--prompt'"),
        (["generate", "runs/x", "--prompt", "a", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["submit", "no.yaml"], "Missing option '--address'"),
        (["eval", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert message in re.sub(r"\s*│\s*", " ", result.output)
    assert "Traceback" not in result.output


def test_errors_of_every_command_end_alike(config: str, training: dict[str, Any]) -> None:
    training["run_on_ray"].side_effect = RunFolderError("runs/tiny holds a run; add --resume or --overwrite")

    result = run("train", config)

    assert (result.exit_code, result.output) == (2, "error: runs/tiny holds a run; add --resume or --overwrite\n")


def test_ctrl_c_is_one_line_and_130(config: str, training: dict[str, Any]) -> None:
    training["run_on_ray"].side_effect = KeyboardInterrupt

    result = run("train", config)

    assert (result.exit_code, result.output) == (130, "interrupted; add --resume to go on from the last checkpoint\n")


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    config: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training["run_on_ray"].side_effect = ZeroDivisionError("a bug")
    monkeypatch.setattr(sys, "argv", ["sparsetrain", "train", config])

    with pytest.raises(SystemExit) as ended:
        main()

    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" in printed
    assert "ZeroDivisionError: a bug" in printed
    assert printed.endswith("This is a bug in sparsetrain; please report it together with the lines above.\n")


def test_submit_hands_on_the_run(config: str, stand_in: Callable[..., Any]) -> None:
    submit = stand_in("sparsetrain.cluster.submit", return_value="job-1")

    result = run("submit", config, "--address", "http://head:8265", "seed=3", "--detach", "--resume")

    assert result.exit_code == 0, result.output
    assert submit.call_args.args == (load_config(config, ["seed=3"]),)
    assert submit.call_args.kwargs == {"address": "http://head:8265", "detach": True, "on_existing": "resume"}
    assert "sparsetrain jobs logs --address http://head:8265 job-1" in result.output


def test_submit_checks_the_yaml_before_it_calls_anyone(config: str, stand_in: Callable[..., Any]) -> None:
    submit = stand_in("sparsetrain.cluster.submit")

    result = run("submit", config, "--address", "http://head:8265", "seed=-3")

    assert result.exit_code == 2
    assert "override seed=-3: must be at least 0" in result.output
    submit.assert_not_called()


def test_eval_prints_a_line_for_each_phase(stand_in: Callable[..., Any]) -> None:
    from sparsetrain.training.evaluation import EvalResult

    results = {"pretrain": EvalResult(1.0, 0.5, 1000), "dense-finetune": EvalResult(2.0, 1.5, 500)}
    stand_in("sparsetrain.training.evaluate_run", return_value=results)

    assert run("eval", "runs/tiny").output.splitlines() == [
        "pretrain: loss 1.0000, perplexity 2.72, 0.5000 bits per byte (1000 held-out tokens)",
        "dense-finetune: loss 2.0000, perplexity 7.39, 1.5000 bits per byte (500 held-out tokens)",
    ]


def test_generate_writes_on_from_the_prompt(stand_in: Callable[..., Any]) -> None:
    generate = stand_in("sparsetrain.training.generate_text", return_value=" world\n\x1b[2J")

    result = run("generate", "runs/tiny", "--prompt", "hello", "--top-k", "0", "--seed", "7", "--temperature", "0")

    assert result.output == "hello world\n�[2J\n", "characters that would move the cursor are not passed on"
    assert generate.call_args.args == (Path("runs/tiny"), "hello")
    assert generate.call_args.kwargs == {"max_tokens": 200, "temperature": 0.0, "top_k": None, "seed": 7}


def test_data_says_what_each_phase_reads(config: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"sentence {n} of a text" for n in range(200)))
    sources = f"{{kind: text, paths: [{tmp_path}/a.txt], max_document_bytes: 200}}"
    options = [f"data.source={sources}", f"data.cache={tmp_path}/cache", "data.seq_len=16", "data.holdout=0.1"]

    result = run("data", config, *options, "train.phases=[{name: same, tokens: 1Ki}]")

    assert result.exit_code == 0, result.output
    assert re.findall(r"^\w+$", result.output, re.MULTILINE) == ["pretrain", "same"]
    assert result.output.count("  tokenizer  bytes: 257 tokens") == 2
    assert result.output.count("a.txt, sha256") == 2


def test_doctor_describes_the_machine(stand_in: Callable[..., Any]) -> None:
    doctor = stand_in("sparsetrain.report.doctor.print_doctor")

    assert run("doctor").exit_code == 0
    doctor.assert_called_once()


def test_doctor_measures_kernels_when_asked(stand_in: Callable[..., Any]) -> None:
    tune = stand_in("sparsetrain.report.tune.tune_kernels")

    assert run("doctor", "--tune", "--minutes", "0.5", "--only", "nm_linear", "--threads", "2").exit_code == 0
    assert tune.call_args.kwargs == {"operations": ["nm_linear"], "limit_s": 30, "threads": 2}


def test_help_shows_the_three_ways_in_and_every_command() -> None:
    text = " ".join(run("--help").output.split())

    for part in ("sparsetrain train configs/demo.yaml", "torchrun", "sparsetrain submit", "import sparsetrain"):
        assert part in text
    for command in ("train", "submit", "eval", "generate", "data", "doctor"):
        assert run(command, "--help").exit_code == 0


def test_version() -> None:
    assert run("--version").output == f"sparsetrain {sparsetrain.__version__}\n"


def test_public_names_are_all_there() -> None:
    for name in sparsetrain.__all__:
        assert getattr(sparsetrain, name) is not None
    assert set(sparsetrain.__all__) <= set(dir(sparsetrain))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsetrain.nonsense


def test_a_bad_yaml_is_refused_in_under_a_second_without_torch(config: str) -> None:
    """The time is not asserted (machines differ): that neither torch nor ray is imported is what makes it."""
    Path(config).write_text(RUN + "colour: red\n")
    code = (
        "import sys\nfrom sparsetrain.cli import main\n"
        f"sys.argv = ['sparsetrain', 'train', {config!r}]\n"
        "try:\n    main()\nexcept SystemExit as ended:\n"
        "    print(ended.code, *(name for name in ('torch', 'ray', 'numpy') if name in sys.modules))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "2\n"
    assert "colour" in done.stderr


def test_python_m_sparsetrain_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsetrain", "--version"], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("sparsetrain ")

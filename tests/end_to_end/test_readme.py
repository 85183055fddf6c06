"""What the README shows is what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.config import check_world, load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


MASKS, ATTENTION, EXPERTS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippet_of_masks_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(MASKS, "README.md", "exec"), {})
    density, numel = re.fullmatch(r"([\d.]+) of (\d+) weights are not zero\n", capsys.readouterr().out).groups()
    assert (float(density), int(numel) > 100_000) == (0.25, True)


def test_the_snippet_of_attention_says_which_kernels_ran(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(ATTENTION, "README.md", "exec"), {})
    assert "block_sparse_attention.output" in capsys.readouterr().out


def test_the_snippet_of_experts_trains_on_two_ranks_in_forty_lines(tmp_path: Path) -> None:
    assert len(EXPERTS.splitlines()) <= 40
    script = tmp_path / "experts.py"
    script.write_text(EXPERTS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=250)

    assert done.returncode == 0, done.stderr
    said = re.findall(r"loss ([\d.]+), fullest rank ([\d.]+) x the mean, \d+ replicas", done.stdout)
    assert len(said) == 2
    assert float(said[1][0]) < 0.9 * float(said[0][0])
    assert all(1 <= float(imbalance) < 1.5 for _, imbalance in said)


@pytest.mark.parametrize("number", [0, 1], ids=["zeros-that-save-time", "experts"])
def test_its_yaml_is_a_run(tmp_path: Path, number: int) -> None:
    sections = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    rest = "data: {seq_len: 64}\ntrain: {tokens: 4Ki, batch_tokens: 1Ki}\ncluster: {workers: 2}\nname: run\n"
    shape = "model:\n  dim: 256\n  num_layers: 1\n  num_heads: 2\n"
    path = tmp_path / "run.yaml"
    path.write_text(sections[number].replace("model:\n", shape) + rest)

    check_world(load_config(path), 4)


@pytest.mark.parametrize("line", [0, 1], ids=["deepspeed", "megatron"])
def test_its_engines_take_the_run_of_experts(tmp_path: Path, line: int) -> None:
    _, experts, engines = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    rest = "data: {seq_len: 64}\ntrain: {tokens: 4Ki, batch_tokens: 1Ki}\ncluster: {workers: 4}\nname: run\n"
    model = experts[: experts.index("parallel:")].replace(
        "model:\n", "model:\n  dim: 8\n  num_layers: 2\n  num_heads: 2\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(model + engines.splitlines(keepends=True)[line] + rest)

    check_world(load_config(path), 4)


def test_every_file_and_folder_that_it_names_is_there() -> None:
    named = re.findall(r"`((?:sparsetrain|kernels|launch|configs)/[\w./]*)`", README)
    named += re.findall(r"(?:--runtime-env|sparsetrain train|submit) ((?:launch|configs)/[\w./]+)", README)
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []

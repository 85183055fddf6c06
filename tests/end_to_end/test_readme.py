"""What the README shows is what there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    density, numel = re.fullmatch(r"([\d.]+) of (\d+) weights are not zero\n", capsys.readouterr().out).groups()
    assert (float(density), int(numel) > 100_000) == (0.25, True)


def test_every_file_and_folder_that_it_names_is_there() -> None:
    named = re.findall(r"`((?:sparsetrain|kernels|launch|configs)/[\w./]*)`", README)
    named += re.findall(r"(?:--runtime-env|sparsetrain train|submit) ((?:launch|configs)/[\w./]+)", README)
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []

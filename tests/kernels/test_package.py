"""The kernel package as a whole: its names, and the example that its docstring gives."""

import re
import textwrap
from pathlib import Path

import pytest
import sparsetrain_kernels
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.block_layout import PATTERNS


def test_the_example_of_the_docstring_runs_and_its_choices_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch.use_table("cpu", None)  # forget the choices of other tests
    found = re.search(r"\n\n((?:    .*\n|\n)+?)\nEvery", sparsetrain_kernels.__doc__ or "")
    assert found
    exec(compile(textwrap.dedent(found.group(1)), "docstring", "exec"), {})
    print(*dispatch.choices(), sep="\n")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["block_sparse_attention.gradients", "block_sparse_attention.output"]


def test_every_name_is_there_and_told_of_in_the_docstring() -> None:
    told = sparsetrain_kernels.__doc__ or ""
    for name in sparsetrain_kernels.__all__:
        assert callable(getattr(sparsetrain_kernels, name))
        assert name in told or name.startswith("expert_ffn_"), name


def test_the_snippets_of_its_readme_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(snippet, "kernels/README.md", "exec"), names)
    assert (tmp_path / "heads.png").stat().st_size > 1000
    told = capsys.readouterr().out
    for operation in ("block_sparse_attention.output", "block_sparse_linear.weight_gradient", "nm_linear.output"):
        assert operation in told
    for pattern in PATTERNS.values():
        assert f"| `{pattern.__name__}(" in text

"""`sparsetrain doctor --tune` measures, says what it did, and its table is chosen from."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.dispatch import DENSE, Implementation, Operation, Problem

from sparsetrain.errors import ConfigError
from sparsetrain.report.tune import tune_kernels


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Operation]:
    """The only operation there is, with four tiny problems."""
    monkeypatch.setenv("SPARSETRAIN_DISPATCH_DIR", str(tmp_path))
    monkeypatch.setattr("sparsetrain_kernels.dispatch.operation.OPERATIONS", registry := {})
    monkeypatch.setattr("sparsetrain_kernels.dispatch.tuning.OPERATIONS", registry)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch.use_table("cpu", None)

    def problems(device: str) -> list[Problem]:
        threads = torch.get_num_threads()
        return [Problem("scale", "", device, torch.float32, (size,), 0.5, threads) for size in (1, 8, 64, 512)]

    slow, fast = Implementation(lambda x: [x * 1 for _ in range(2000)]), Implementation(lambda x: x * 1)
    implementations = {DENSE: slow, "fast": fast}
    yield Operation("scale", implementations, problems, lambda problem: (torch.ones(problem.sizes),))
    dispatch.use_table("cpu", None)


def tuned(*operations: str, minutes: float = 1, threads: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=200)
    tune_kernels(console, operations=operations, limit_s=60 * minutes, threads=threads)
    return console.file.getvalue()


def test_times_are_kept_in_the_users_folder_and_chosen_from(operation: Operation, tmp_path: Path) -> None:
    text = tuned()
    path = tmp_path / f"{dispatch.hardware_name('cpu')}.csv"
    assert f"measured 4 of 4 problems on {torch.get_num_threads()} threads" in text
    assert f"written to {path}" in text
    dispatch.use_table("cpu", None)
    choice = operation.choose("cpu", torch.float32, "", (512,), 0.5)
    assert (choice.implementation, choice.seconds is not None) == ("fast", True)


def test_times_hold_for_the_threads_that_were_asked_for(operation: Operation) -> None:
    before = torch.get_num_threads()
    assert "on 3 threads" in tuned("scale", threads=3)
    assert {problem.threads for problem in dispatch.table("cpu").times if problem.operation == "scale"} == {3}
    assert torch.get_num_threads() == before


def test_what_the_time_did_not_suffice_for_is_said(operation: Operation) -> None:
    text = tuned(minutes=1e-9)
    assert "measured 1 of 4" in text or "measured 0 of 4" in text
    assert "more --minutes" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "--minutes 0 leaves no time"),
        ({"threads": 0}, "--threads 0 cannot run anything"),
    ],
    ids=["minutes", "threads"],
)
def test_senseless_options_are_refused(operation: Operation, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned(**options)


def test_an_unknown_operation_is_named_with_those_that_there_are(operation: Operation) -> None:
    with pytest.raises(ConfigError, match=r"--only: operations=\['unheard'\]: not registered; there are scale"):
        tuned("unheard")

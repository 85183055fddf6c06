"""The dispatcher: its rule, its tables, what it says, and tuning."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sparsetrain_kernels import dispatch
from sparsetrain_kernels.dispatch import DENSE, Choice, Implementation, Operation, Problem, Table

from sparsetrain.testing import assert_close

SIZES = (1024, 512, 256)


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Operation]:
    """An operation of our own whose implementations say their names, and an empty table."""
    monkeypatch.setenv("SPARSETRAIN_DISPATCH_DIR", str(tmp_path))
    monkeypatch.setattr("sparsetrain_kernels.dispatch.operation.OPERATIONS", registry := {})
    monkeypatch.setattr("sparsetrain_kernels.dispatch.tuning.OPERATIONS", registry)
    implementations = {
        DENSE: Implementation(lambda *arguments: DENSE),
        "fast": Implementation(lambda *arguments: "fast"),
        "picky": Implementation(lambda *arguments: "picky", suits=lambda problem: problem.variant == "even"),
        "elsewhere": Implementation(lambda *arguments: "elsewhere", devices=("cuda",)),
    }
    yield Operation("scale", implementations, lambda device: [problem()], lambda problem: ())
    dispatch.use_table("cpu", None)


def problem(
    sizes: tuple[int, ...] = SIZES, density: float = 0.25, variant: str = "odd", dtype: torch.dtype = torch.float32
) -> Problem:
    return Problem("scale", variant, "cpu", dtype, sizes, density, torch.get_num_threads())


def times(**milliseconds: float) -> dict[str, float]:
    return {name: value / 1e3 for name, value in milliseconds.items()}


def chosen(operation: Operation, wanted: Problem, measured: dict[Problem, dict[str, float]]) -> Choice:
    dispatch.use_table("cpu", Table("here", measured))
    return operation.choose("cpu", wanted.dtype, wanted.variant, wanted.sizes, wanted.density)


def test_the_fastest_at_the_nearest_measured_problem_is_chosen(operation: Operation) -> None:
    near, nearest = problem((512, 512, 256)), problem()
    measured = {near: times(dense=10, fast=1, picky=5), nearest: times(dense=10, fast=6, picky=5)}
    assert chosen(operation, nearest, measured).implementation == "fast"  # picky does not suit this variant
    measured = {point._replace(variant="even"): seconds for point, seconds in measured.items()}
    assert chosen(operation, problem((1020, 512, 256), variant="even"), measured).implementation == "picky"


@pytest.mark.parametrize(
    "wanted",
    [problem((2200, 512, 256)), problem(density=0.6), problem(dtype=torch.bfloat16), problem(variant="even")],
    ids=["size", "density", "dtype", "variant"],
)
def test_dense_runs_where_nothing_near_was_measured(operation: Operation, wanted: Problem) -> None:
    choice = chosen(operation, wanted, {problem(): times(dense=10, fast=1)})
    assert choice.implementation == DENSE
    assert choice.seconds is None
    assert "nothing was measured near" in str(choice)


def test_a_gain_within_the_margin_of_measurement_is_no_gain(operation: Operation) -> None:
    choice = chosen(operation, problem(), {problem(): times(dense=10, fast=9.7)})
    assert choice.implementation == DENSE
    assert "fast 9.7 ms is no clear gain" in str(choice)


def test_an_implementation_that_lost_at_any_near_problem_is_not_chosen(operation: Operation) -> None:
    measured = {problem(): times(dense=10, fast=1), problem((1024, 1024, 256)): times(dense=10, fast=11)}
    assert chosen(operation, problem(), measured).implementation == DENSE
    assert (
        chosen(operation, problem((1024, 500, 256)), measured).implementation == "fast"
    )  # the loss is farther than 2x


def test_a_choice_says_both_times_scaled_to_the_problem(operation: Operation) -> None:
    choice = chosen(operation, problem((2048, 512, 256), density=0.2), {problem(): times(dense=10, fast=4)})
    assert (choice.seconds, choice.dense_seconds) == (pytest.approx(0.008), pytest.approx(0.020))
    assert "fast (expected 8 ms, dense 20 ms, by 1024x512x256 at density 0.25" in str(choice)
    assert dispatch.choices() == [choice]


def test_what_is_sparser_is_judged_by_what_was_measured_at_the_next_density(operation: Operation) -> None:
    measured = {
        problem(density=0.125): times(dense=10, fast=1),
        problem(density=0.25): times(dense=10, fast=4),
        problem(density=0.5): times(dense=10, fast=11),
    }
    expected = {0.0: "fast", 0.125: "fast", 0.2: "fast", 0.25: "fast", 0.3: DENSE, 0.5: DENSE, 0.6: DENSE}
    found = {density: chosen(operation, problem(density=density), measured) for density in expected}
    assert {density: choice.implementation for density, choice in found.items()} == expected
    assert found[0.2].seconds == pytest.approx(0.004)


def test_dense_runs_where_nothing_else_can(operation: Operation) -> None:
    choice = operation.choose("xpu", torch.float32, "odd", SIZES, 0.25)
    assert choice.implementation == DENSE
    assert "no other implementation computes this here" in str(choice)


def test_no_tokens_are_near_nothing(operation: Operation) -> None:
    assert chosen(operation, problem((0, 512, 256)), {problem(): times(dense=10, fast=1)}).implementation == DENSE


def test_running_follows_the_choice_until_forced(operation: Operation) -> None:
    dispatch.use_table("cpu", Table("here", {problem(): times(dense=10, fast=1)}))
    like = torch.ones(1)
    arguments = (like, ("odd", SIZES, 0.25))
    assert operation.run(*arguments) == "fast"
    with operation.force("picky"):
        assert operation.run(*arguments) == "picky"
    assert operation.run(*arguments) == "fast"
    with (
        pytest.raises(ValueError, match="no implementation 'quick'; choose one of dense, fast"),
        operation.force("quick"),
    ):
        pass


def test_choices_are_forgotten_before_they_fill_memory(operation: Operation) -> None:
    dispatch.use_table("cpu", Table("here"))
    for tokens in range(1, 5000):
        operation.choose("cpu", torch.float32, "odd", (tokens,), 1.0)
    assert len(dispatch.choices()) <= 4096


def test_tuning_writes_a_table_that_is_read_back_and_chosen_from(operation: Operation) -> None:
    lines: list[tuple[str, int, int]] = []
    tuned = dispatch.tune("cpu", ["scale"], repeats=1, report=lambda *line: lines.append(line))
    assert set(tuned.table.times[problem()]) == {DENSE, "fast"}
    assert [line[1:] for line in lines] == [(1, 1)] == [(tuned.measured, tuned.wanted)]
    assert tuned.path == dispatch.own_table(dispatch.hardware_name("cpu"))
    read = dispatch.load_table(dispatch.hardware_name("cpu"), "cpu")
    assert read.times[problem()] == pytest.approx(tuned.table.times[problem()], rel=1e-3)
    assert dispatch.table("cpu") is tuned.table


def test_tuning_keeps_the_times_of_what_it_does_not_come_to(operation: Operation) -> None:
    known = {problem()._replace(operation="another"): times(dense=1), problem((8, 8, 8)): times(dense=2)}
    dispatch.use_table("cpu", Table("here", dict(known)))
    tuned = dispatch.tune("cpu", ["scale"], limit_s=-1)
    assert (tuned.measured, tuned.wanted) == (0, 1)
    assert tuned.table.times == known


def test_tuning_takes_the_beginnings_of_names_and_names_unknown_ones(operation: Operation) -> None:
    assert dispatch.tune("cpu", ["sca"], repeats=1).measured == 1
    with pytest.raises(ValueError, match=r"operations=\['unheard'\]: not registered; there are scale"):
        dispatch.tune("cpu", ["unheard"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not a table", "first line must be operation,variant,dtype"),
        ("{header}\nscale,odd,float33,1,8x8x8,0.5,dense=1", "line 2: no row of times .*float33"),
        ("{header}\nscale,odd,float32,1,8xmany,0.5,dense=1", "line 2: no row of times .*many"),
        ("{header}\nscale,odd,float32,1,8x8x8,0.5,fast=1", "line 2: .*no time of dense"),
        ("{header}\nscale,odd", "line 2: no row of times"),
    ],
    ids=["header", "dtype", "sizes", "dense", "short"],
)
def test_a_broken_table_is_named_with_what_would_do_and_tuning_replaces_it(
    operation: Operation, text: str, message: str
) -> None:
    path = dispatch.own_table(dispatch.hardware_name("cpu"))
    path.write_text(text.format(header="operation,variant,dtype,threads,sizes,density,milliseconds"))
    dispatch.use_table("cpu", None)
    with pytest.raises(dispatch.TableError, match=message) as caught:
        operation.run(torch.ones(1), ("odd", SIZES, 0.25))
    assert str(path) in str(caught.value)
    assert "sparsetrain doctor --tune" in str(caught.value)
    dispatch.tune("cpu", repeats=1)
    assert operation.run(torch.ones(1), ("odd", SIZES, 0.25)) in (DENSE, "fast")


def test_an_operation_may_name_what_runs_where_nothing_was_measured(operation: Operation) -> None:
    own = Operation("own", operation.implementations, unmeasured=lambda problem, candidates: (candidates[0], "just so"))
    dispatch.use_table("cpu", Table("here"))
    choice = own.choose("cpu", torch.float32, "odd", SIZES, 0.25)
    assert choice.implementation == "fast"
    assert "nothing was measured near this problem on here; just so" in str(choice)


def test_an_operation_may_name_how_near_a_measured_problem_must_be(operation: Operation) -> None:
    own = Operation("own", operation.implementations, near=(3.0, 0.5, 1.0))
    table = Table("here", {problem()._replace(operation="own"): times(dense=10, fast=1)})
    for sizes, expected in {(8192, 512, 256): "fast", (1024, 700, 256): "fast", (1024, 800, 256): DENSE}.items():
        dispatch.use_table("cpu", table)
        assert own.choose("cpu", torch.float32, "odd", sizes, 0.25).implementation == expected


def test_a_shipped_table_can_be_read_whole() -> None:
    folder = Path(dispatch.__file__).parent / "tables"
    for path in folder.glob("*.csv"):
        with path.open() as file:
            read = Table.read(file, path.stem, "cpu")
        assert read.times
        assert all(DENSE in found and min(found.values()) > 0 for found in read.times.values())


def test_an_operation_needs_a_dense_implementation_and_a_name_of_its_own(operation: Operation) -> None:
    with pytest.raises(ValueError, match="no 'dense' implementation"):
        Operation("bare", {"fast": Implementation(lambda: None)})
    with pytest.raises(ValueError, match="two operations are called scale"):
        Operation("scale", operation.implementations)
    with pytest.raises(ValueError, match="no operation is called 'unheard'; there are scale"):
        dispatch.explain("unheard", "cpu", torch.float32, "", (1,), 1.0)


SPARSE = [name for name in dispatch.OPERATIONS if name.startswith(("block_sparse_linear.", "nm_linear."))]


@pytest.mark.parametrize("name", SPARSE)
def test_what_tuning_runs_computes_the_same_by_every_implementation(name: str) -> None:
    operation = dispatch.OPERATIONS[name]
    problems = {problem.variant: problem for problem in operation.measured("cpu") if problem.dtype == torch.float32}
    compared = 0
    for problem in problems.values():
        problem = problem._replace(sizes=(16, 256, 256))
        arguments = operation.arguments(problem)
        expected = operation.implementations[DENSE].run(*arguments)
        for candidate in operation.candidates(problem):
            found = operation.implementations[candidate].run(*arguments)
            assert_close(found, expected, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared >= len(problems)

"""Which implementation of block-sparse attention the dispatcher chooses, and that all compute the same."""

from collections.abc import Iterator

import pytest
import torch
from sparsetrain_kernels import BlockLayout, block_sparse_attention, dispatch
from sparsetrain_kernels.block_layout import Dense, Local
from sparsetrain_kernels.block_sparse_attention.implementations import BACKWARD, FORWARD, problem_of
from sparsetrain_kernels.dispatch import DENSE, Operation, Problem, Table
from sparsetrain_kernels.dispatch.table import shipped_table

from sparsetrain.testing import assert_close

SIZES = (8, 256, 256, 64)


@pytest.fixture(autouse=True)
def no_table() -> Iterator[None]:
    dispatch.use_table("cpu", Table("here"))
    yield
    dispatch.use_table("cpu", None)


@pytest.mark.parametrize("operation", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_without_a_table_blocks_are_computed_unless_few_are_hidden(operation: Operation) -> None:
    def chosen(variant: str, density: float, tokens: int = 2048) -> dispatch.Choice:
        return operation.choose("cpu", torch.float32, variant, (8, tokens, tokens, 64), density)

    choice = chosen("block 64, causal", 0.5)
    assert choice.implementation == "cpu"
    assert "nothing was measured near" in str(choice)
    assert "a mask of all tokens by all tokens" in str(choice)
    assert chosen("block 64, causal, whole", 1.0).implementation == DENSE
    assert chosen("block 64, causal, whole, log-sum-exp", 0.5).implementation == "cpu"
    assert "most blocks are seen" in str(chosen("block 64, causal", 0.6))
    assert chosen("block 64, causal", 0.6, tokens=8192).implementation == "cpu"
    assert "the sequences are short" in str(chosen("block 64, causal", 0.1, tokens=512))


def test_each_pass_has_a_choice_of_its_own_by_measured_times() -> None:
    points = [
        Problem(operation.name, "block 64, causal", "cpu", torch.float32, SIZES, 0.5, torch.get_num_threads())
        for operation in (FORWARD, BACKWARD)
    ]
    times = [{DENSE: 1e-3, "cpu": 2e-3}, {DENSE: 4e-3, "cpu": 2e-3}]
    dispatch.use_table("cpu", Table("here", dict(zip(points, times, strict=True))))
    layout = BlockLayout.build(Local(1), 256, num_heads=8)
    q = torch.randn(1, 256, 8, 64, requires_grad=True)
    block_sparse_attention(q, q, q, layout, causal=True).sum().backward()
    found = {choice.problem.operation: choice.implementation for choice in dispatch.choices()}
    assert found == {FORWARD.name: DENSE, BACKWARD.name: "cpu"}
    told = dispatch.explain(BACKWARD.name, "cpu", torch.float32, "block 64, causal", SIZES, 0.4)
    assert "cpu (expected 2 ms, dense 4 ms" in told


def test_wide_heads_are_chosen_for_by_times_of_wide_heads() -> None:
    """A dense mask costs the same for a head of 128 as for one of 64, so what gains at 64 may lose at 128."""
    with shipped_table("amd-epyc-avx512-bf16").open() as file:
        table = Table.read(file, "shipped", "cpu")

    narrow = Table("narrow", {problem: times for problem, times in table.times.items() if problem.sizes[-1] == 64})
    problem = Problem(FORWARD.name, "block 32", "cpu", torch.float32, (4, 1194, 1194, 128), 0.97, 1)
    chosen = [times.choose(problem, ["cpu"], FORWARD.near).implementation for times in (table, narrow)]
    assert chosen == [DENSE, "cpu"]


@pytest.mark.parametrize(
    ("layout", "causal", "expected"),
    [
        (BlockLayout.build(Dense(), 100, block=32), True, ("block 32, causal, whole", 1.0)),
        (BlockLayout.build(Dense(), 100, block=32), False, ("block 32", 10 / 16)),
        (BlockLayout.build(Dense(), 100, block=96, causal=False), False, ("block 32, whole", 1.0)),
        (BlockLayout.build(Local(1), 100, block=25), True, ("block 1, causal", 4 / 10)),
    ],
    ids=["causal", "triangle", "full", "local"],
)
def test_a_call_says_what_the_choice_depends_on(layout: BlockLayout, causal: bool, expected: tuple[str, float]) -> None:
    q, k = torch.empty(2, 100, 6, 16), torch.empty(2, 100, 3, 16)
    visible = layout.visibility(2, 100, 100, causal=causal)
    variant, sizes, density = problem_of(q, k, visible)
    assert (variant, sizes) == (expected[0], (12, 100, 100, 16))
    assert density == pytest.approx(expected[1])
    documents = layout.visibility(2, 100, 100, causal=causal, cu_seqlens=torch.tensor([0, 30, 100]))
    assert "whole" not in problem_of(q, k, documents)[0]


@pytest.mark.parametrize("operation", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_what_tuning_runs_computes_the_same_by_every_implementation(operation: Operation) -> None:
    problems = {(problem.variant, problem.density): problem for problem in operation.measured("cpu")}
    for problem in problems.values():
        problem = problem._replace(sizes=(2, 256, 256, 16), dtype=torch.float32)
        arguments = operation.arguments(problem)
        expected = operation.implementations[DENSE].run(*arguments)
        assert operation.candidates(problem) == ["cpu"]
        for found, dense in zip(operation.implementations["cpu"].run(*arguments), expected, strict=True):
            assert_close(found, dense, rtol=1e-4, atol=1e-4)

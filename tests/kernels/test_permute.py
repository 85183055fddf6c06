"""Tokens to rows and back: values, gradients, and index arithmetic."""

from collections.abc import Callable

import pytest
import torch
from sparsetrain_kernels import permute, sort_by_expert, unpermute
from torch import Tensor

TOKENS, DIM = 7, 6
ROWS = {
    "top-2": [0, 2, 5, 1, 2, 3, 4, 6, 0, 1, 3, 4, 5, 6],
    "uneven": [3, 3, 3, 0, 6, 3],
    "one-token": [4, 4, 4, 4],
    "one-row": [6],
    "no-rows": [],
}
rows = pytest.mark.parametrize(
    "token_R", [pytest.param(torch.tensor(r, dtype=torch.int64), id=k) for k, r in ROWS.items()]
)


def values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def gradients(call: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = call(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def summed_one_by_one(y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> Tensor:
    y_TD = [torch.zeros(DIM, dtype=y_RD.dtype) for _ in range(TOKENS)]
    for row, token in enumerate(token_R.tolist()):
        y_TD[token] = y_TD[token] + y_RD[row] * weight_R[row]
    return torch.stack(y_TD) + 0 * (y_RD.sum() + weight_R.sum())


@rows
def test_permute_copies_tokens_and_adds_up_their_gradients(token_R: Tensor) -> None:
    x_TD, dy_RD = values(TOKENS, DIM), values(len(token_R), DIM)
    y, dx = gradients(lambda x: permute(x, token_R), dy_RD, x_TD)
    assert torch.equal(y, x_TD[token_R])
    torch.testing.assert_close(dx, summed_one_by_one(dy_RD, torch.ones(len(token_R)), token_R))


@rows
def test_unpermute_adds_up_weighted_rows(token_R: Tensor) -> None:
    inputs = values(len(token_R), DIM), values(len(token_R))
    dy_TD = values(TOKENS, DIM)
    ours = gradients(lambda y, w: unpermute(y, w, token_R, TOKENS), dy_TD, *inputs)
    theirs = gradients(lambda y, w: summed_one_by_one(y, w, token_R), dy_TD, *inputs)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)], ids=["fp32", "bf16"])
def test_results_have_the_dtype_of_the_rows_and_its_precision(dtype: torch.dtype, bound: float) -> None:
    token_R = torch.tensor(ROWS["top-2"])
    y_RD, weight_R, dy_TD = values(len(token_R), DIM, dtype=dtype), values(len(token_R)).float(), values(TOKENS, DIM)
    ours = gradients(lambda y, w: unpermute(y, w, token_R, TOKENS), dy_TD.to(dtype), y_RD, weight_R)
    theirs = gradients(lambda y, w: summed_one_by_one(y, w, token_R), dy_TD, y_RD.double(), weight_R.double())
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32]
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound * expected.abs().max().item())


def test_gradients_may_be_expanded_and_inputs_strided() -> None:
    token_R = torch.tensor(ROWS["uneven"])
    x_TD = values(DIM, TOKENS).mT.requires_grad_()
    permute(x_TD, token_R).sum().backward()
    assert x_TD.grad is not None
    assert torch.equal(x_TD.grad, torch.bincount(token_R, minlength=TOKENS).double().unsqueeze(1).expand(TOKENS, DIM))
    y_RD = values(DIM, len(token_R)).mT.requires_grad_()
    weight_R = values(2, len(token_R))[0].requires_grad_()
    unpermute(y_RD, weight_R, token_R, TOKENS).sum().backward()
    torch.testing.assert_close(y_RD.grad, weight_R.detach().unsqueeze(1).expand(len(token_R), DIM))
    torch.testing.assert_close(weight_R.grad, y_RD.detach().sum(1))


def test_uninitialised_memory_is_never_read(poisoned_memory: None) -> None:
    token_R = torch.tensor(ROWS["uneven"])
    y_RD, weight_R, dy_TD = values(len(token_R), DIM), values(len(token_R)), values(TOKENS, DIM)
    found = gradients(lambda y, w: unpermute(permute(y, token_R % 3), w, token_R, TOKENS), dy_TD, y_RD, weight_R)
    assert all(t.isfinite().all() for t in found)


@rows
def test_operators_pass_torchs_own_checks(token_R: Tensor) -> None:
    x_TD, y_RD, weight_R = values(TOKENS, DIM), values(len(token_R), DIM), values(len(token_R))
    leaves = [t.requires_grad_() for t in (x_TD, y_RD, weight_R)]
    torch.library.opcheck(torch.ops.sparsetrain.permute.default, (leaves[0], token_R))
    torch.library.opcheck(torch.ops.sparsetrain.unpermute.default, (leaves[1], leaves[2], token_R, TOKENS))


@pytest.mark.parametrize(
    "expert_TK",
    [
        pytest.param([[3, 1], [1, 0], [3, 4], [0, 1]], id="top-2"),
        pytest.param([[2], [2], [2]], id="one-expert"),
        pytest.param([[4, 3, 2, 1, 0]], id="one-token"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_rows_are_sorted_by_expert_then_by_token(expert_TK: list[list[int]], dtype: torch.dtype) -> None:
    expected = sorted((expert, token) for token, experts in enumerate(expert_TK) for expert in experts)
    token_R, row_of_TK, counts_E = sort_by_expert(torch.tensor(expert_TK, dtype=dtype), 5)
    assert token_R.tolist() == [token for _, token in expected]
    assert counts_E.tolist() == [sum(expert == e for expert, _ in expected) for e in range(5)]
    for token, experts in enumerate(expert_TK):
        assert [expected[row] for row in row_of_TK[token].tolist()] == [(expert, token) for expert in experts]


def test_no_tokens_make_no_rows() -> None:
    token_R, row_of_TK, counts_E = sort_by_expert(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert (token_R.shape, row_of_TK.shape, counts_E.tolist()) == ((0,), (0, 2), [0, 0, 0])


TOKEN_R = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permute(torch.ones(3), TOKEN_R), r"x_TD is torch.float32 of shape \(3,\): expected floats of two"),
        (lambda: permute(torch.ones(3, 2), TOKEN_R.int()), "token_R is torch.int32 .*: expected int64"),
        (lambda: unpermute(torch.ones(2, 2), torch.ones(2), TOKEN_R, 2), r"token_R .*: expected int64 of shape \(2,\)"),
        (
            lambda: unpermute(torch.ones(3, 2), torch.ones(2), TOKEN_R, 2),
            r"weight_R .*: expected floats of shape \(3,\)",
        ),
        (lambda: sort_by_expert(TOKEN_R, 2), r"expert_TK is torch.int64 of shape \(3,\): expected integers of two"),
        (lambda: sort_by_expert(TOKEN_R.view(3, 1), 0), "num_experts = 0: expected at least 1"),
    ],
    ids=["vector", "int32-tokens", "rows", "weights", "experts-of-tokens", "no-experts"],
)
def test_tensors_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""What tests of kernels share."""

from collections.abc import Iterator

import pytest
import torch
from sparsetrain_kernels.row_backend import force_rows


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors that are not initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", pytest.param("triton", marks=[pytest.mark.gpu] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where it is computed, by each backend of rows; Triton in its interpreter where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with force_rows(request.param):
        yield "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"

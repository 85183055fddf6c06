"""How exactly kernels multiply."""

from types import SimpleNamespace

import pytest
import torch
from sparsetrain_kernels.precision import of_triton_products


@pytest.mark.parametrize(
    ("dtype", "setting", "precision"),
    [
        (torch.float32, "none", "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.bfloat16, "tf32", "ieee"),
    ],
    ids=["fp32", "tf32", "bf16"],
)
def test_float32_is_multiplied_as_torch_was_told(
    dtype: torch.dtype, setting: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Put in its place: once set through it, torch's setting can no more be read through the older allow_tf32.
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
    assert of_triton_products(torch.ones(1, dtype=dtype))["PRECISION"] == precision

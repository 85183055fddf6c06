import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.errors import TrainingError
from sparsetrain.sharding import WeightShard
from sparsetrain.sparsity.keys import fixed_point, largest_magnitudes, magnitude_keys, random_keys

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -3.4028235e38, 3.4028235e38, 1.0, -1.0]


def shard_of(weight: Tensor) -> WeightShard:
    slices = tuple(slice(0, size) for size in weight.shape)
    return WeightShard("w", tuple(weight.shape), slices, None, 0, lambda: weight, lambda: None, lambda: weight, dict)


@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False))))
def test_magnitude_keys_order_floats_exactly(values: list[float]) -> None:
    weights = torch.tensor(values, dtype=torch.float32)
    magnitudes = weights.double().abs().numpy()
    for keys in (magnitude_keys(weights), magnitude_keys(weights.double())):
        as_numpy = keys.numpy().astype(np.int64)
        assert ((as_numpy[:, None] < as_numpy) == (magnitudes[:, None] < magnitudes)).all()
        assert ((as_numpy[:, None] == as_numpy) == (magnitudes[:, None] == magnitudes)).all()
        assert (as_numpy >= 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_half_precision_are_those_of_the_same_values_in_fp32(dtype: torch.dtype) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(magnitude_keys(values), magnitude_keys(values.float()))


def test_random_keys_are_splitmix64_and_differ_by_seed_and_name() -> None:
    def splitmix64(seed: int, name: str, index: int) -> int:
        import hashlib

        word = 2**64 - 1
        base = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
        z = (base + index * 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return ((z ^ (z >> 31)) >> 34) + 1

    index = torch.tensor([0, 1, 2, 12345, 2**40 + 7])
    assert random_keys(3, "a.weight", index).tolist() == [splitmix64(3, "a.weight", int(i)) for i in index]
    many = torch.arange(20_000)
    keys = random_keys(3, "a.weight", many)
    for other in (random_keys(4, "a.weight", many), random_keys(3, "b.weight", many)):
        assert abs(np.corrcoef(keys.numpy(), other.numpy())[0, 1]) < 0.03
    assert len(keys.unique()) > 19_990


def test_random_keys_are_uniform() -> None:
    keys = random_keys(0, "w", torch.arange(64_000)).double() / 2**30
    counts = torch.histc(keys, 64, 0, 1)
    assert keys.max() <= 1
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 110  # chi-squared, 63 degrees of freedom: 99.98 %


@given(st.lists(st.floats(-4.0, 4.0, width=32), min_size=1))
def test_fixed_point_keeps_what_floats_of_similar_size_hold(values: list[float]) -> None:
    values = [round(value * 2**20) / 2**20 for value in values]
    largest = max(map(abs, values))
    scale = 2.0 ** (40 - max(math.frexp(largest)[1], -900)) if largest else 1.0
    found = fixed_point(torch.tensor(values), largest, 40)
    assert found.tolist() == [int(abs(value) * scale) for value in values]
    assert found.max() <= 2**40


def test_fixed_point_survives_the_smallest_and_the_largest_float64() -> None:
    tiny = torch.tensor([5e-324, 0.0], dtype=torch.float64)
    assert (fixed_point(tiny, 5e-324, 61) >= 0).all()
    huge = torch.tensor([1.7e308, 0.8e308], dtype=torch.float64)
    assert fixed_point(huge, 1.7e308, 61).tolist()[0] > fixed_point(huge, 1.7e308, 61).tolist()[1] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_an_error(bad: float, dtype: torch.dtype) -> None:
    good, spoiled = torch.ones(4, dtype=dtype), torch.tensor([1.0, bad, -2.0], dtype=dtype)
    assert largest_magnitudes([shard_of(-3 * good)], [-3 * good]) == [3.0]
    with pytest.raises(TrainingError, match=r"w holds NaN or infinite weights \(1 of 2 weights do\)"):
        largest_magnitudes([shard_of(good), shard_of(spoiled)], [good, spoiled])

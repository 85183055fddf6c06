import math

import pytest

from sparsetrain.config import OptimizerConfig
from sparsetrain.training.lr_schedule import learning_rate

TOTAL = 1000


def rate(tokens: int, **schedule: object) -> float:
    return learning_rate(OptimizerConfig.model_validate({"lr": 2.0, "schedule": schedule}), tokens, TOTAL)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert rate(50, kind=kind, warmup=0.1) == pytest.approx(1.0)
    assert rate(100, kind=kind, warmup=0.1) == pytest.approx(2.0)


@pytest.mark.parametrize(("kind", "final"), [("cosine", 0.1), ("linear", 0.25), ("wsd", 0.0)])
def test_the_last_step_uses_the_final_rate(kind: str, final: float) -> None:
    assert rate(TOTAL, kind=kind, final=final) == pytest.approx(2.0 * final)


def test_cosine_follows_its_formula() -> None:
    expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (400 - 100) / 900)))
    assert rate(400, kind="cosine", warmup=0.1, final=0.1) == pytest.approx(expected)


def test_linear_is_halfway_at_half_time() -> None:
    assert rate(500, kind="linear", warmup=0.0, final=0.0) == pytest.approx(1.0)


def test_wsd_holds_the_peak_until_its_decay() -> None:
    assert rate(799, kind="wsd", warmup=0.1, decay=0.2, final=0.0) == pytest.approx(2.0)
    assert rate(900, kind="wsd", warmup=0.1, decay=0.2, final=0.0) == pytest.approx(1.0)


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert rate(1, kind="constant", warmup=0.0) == 2.0


def test_a_warmup_as_long_as_the_phase_ends_at_the_peak() -> None:
    assert rate(500, kind="cosine", warmup=1.0) == pytest.approx(1.0)
    assert rate(TOTAL, kind="linear", warmup=1.0, final=1.0) == pytest.approx(2.0)

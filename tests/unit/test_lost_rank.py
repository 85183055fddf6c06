"""Errors of collectives that mean that another rank is gone."""

from pathlib import Path

import pytest

from sparsetrain.errors import RankLostError
from sparsetrain.parallel import lost_a_rank, told_if_a_rank_is_lost
from tests.training_runs import tiny_config

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12450: Connection reset by peer"
)
LATE = "[../third_party/gloo/unbound_buffer.cc:129] Timed out waiting 8000ms for send operation to complete"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{CLOSED}. This is typically caused by a remote worker",
            "Read error [127.0.0.1]:12450: Connection reset by peer",
        ),
        (LATE, "Timed out waiting 8000ms for send operation to complete"),
        (
            "NCCL error: remote process exited or there was a network error\nmore",
            "NCCL error: remote process exited or",
        ),
    ],
    ids=["closed", "late", "nccl"],
)
def test_a_lost_rank_is_told_with_what_was_being_done(text: str, said: str) -> None:
    error = RuntimeError(text)
    error.add_note("while gathering the experts of layers.3.moe.experts: see there")
    with pytest.raises(RankLostError) as told, told_if_a_rank_is_lost(tiny_config(Path())):
        raise error

    assert lost_a_rank(error)
    assert lost_a_rank(told.value)
    assert told.value.__cause__ is error
    assert str(told.value).startswith(
        "another rank has stopped, or did not come within cluster.collective_timeout_s=600"
    )
    assert f", while gathering the experts of layers.3.moe.experts ({said}" in str(told.value)
    assert "typically" not in str(told.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("timed out waiting")], ids=str)
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, told_if_a_rank_is_lost(tiny_config(Path())):
        raise error
    assert raised.value is error

import os
import signal

import pytest
import torch
import torch.distributed as dist

from sparsetrain.testing import distributed, run_distributed
from sparsetrain.testing.distributed import DistributedTestError


def rank_times(factor: int, *, plus: int = 0) -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank() * factor + plus + int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the second rank is unwell")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        signal.pause()


def test_results_come_back_by_rank() -> None:
    assert run_distributed(rank_times, 2, 10, plus=5) == [6, 16]


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(DistributedTestError, match=r"rank 1: (.|\n)*the second rank is unwell"):
        run_distributed(fail_on_rank_one, 2)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(DistributedTestError, match=r"rank 1: died without a word \(exit code -9\)"):
        run_distributed(die_on_rank_one, 2)


def test_ranks_that_never_start_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_START_LIMIT_S", 0.01)
    with pytest.raises(DistributedTestError, match=r"ranks 0, 1 did not start within 0\.01 s"):
        run_distributed(rank_times, 2, 10, timeout_s=0.01)


def test_a_hang_becomes_a_failure_that_shows_stacks() -> None:
    with pytest.raises(DistributedTestError, match=r"did not finish within 2 s(.|\n)*wait_for_nobody"):
        run_distributed(wait_for_nobody, 2, timeout_s=2)

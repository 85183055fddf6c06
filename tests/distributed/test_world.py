"""The groups that a run makes for itself."""

from datetime import timedelta
from pathlib import Path

import torch

from sparsetrain.parallel import join_world
from sparsetrain.testing import run_distributed
from tests.training_runs import tiny_config


def timeouts_of_a_mesh() -> list[timedelta]:
    config = tiny_config(Path(), cluster={"collective_timeout_s": 7})
    with join_world(config) as world:
        mesh = world.mesh(1)
        assert [mesh.size(0), mesh.size(1)] == [2, 1]
        groups = [mesh.get_group(name) for name in ("replicate", "shard")]
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_no_group_waits_for_a_lost_rank_longer_than_the_run_says() -> None:
    assert run_distributed(timeouts_of_a_mesh, 2) == [[timedelta(seconds=7)] * 2] * 2

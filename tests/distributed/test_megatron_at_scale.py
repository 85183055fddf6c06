"""One rank of a layout of hundreds, built without weights over process groups that connect nothing."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparsetrain.config import load_config
from sparsetrain.planning.rank_bytes import RankBytes
from sparsetrain.report.plan import plan_run
from sparsetrain.testing import run_distributed
from sparsetrain.testing.megatron_cpu import megatron_on_cpu

pytest.importorskip("megatron.core")

CONFIG = load_config(Path(__file__).parents[2] / "configs/clusters/moe_200b_megatron.yaml")


def build_rank(rank: int) -> RankBytes:
    """What a rank of the large mixture holds."""
    from sparsetrain.engines.megatron_engine import make_groups
    from sparsetrain.engines.megatron_model import MegatronModel, Shape

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=CONFIG.cluster.workers)
    with megatron_on_cpu():
        make_groups(CONFIG)
        shape = Shape(CONFIG.model, CONFIG.model.vocab_size, CONFIG.data.seq_len, sequence_parallel=True)
        with torch.device("meta"):
            assert torch.empty(0).is_meta  # else the model would fill the memory of this machine
            model = MegatronModel(shape)
        timeout = timedelta(seconds=10)
        model.spread_experts(CONFIG.parallel, timeout)
        rows = model.share_rows(timeout)
    held = sum(parameter.nbytes for parameter in model.parameters())
    updated = sum(rows.piece(parameter).nbytes for parameter in model.parameters())
    return RankBytes(weights=held, gradients=held, optimizer=2 * updated)


def build_first_and_last_stage() -> list[RankBytes]:
    return [build_rank(0), build_rank(CONFIG.cluster.workers - 1)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_of_the_large_mixture_hold_what_is_planned() -> None:
    first, last = run_distributed(build_first_and_last_stage, 1, timeout_s=200)[0]

    planned = plan_run(CONFIG).bytes_a_rank
    assert last == planned
    assert planned.weights - first.weights == 4 * CONFIG.model.dim  # the head is as large as the embedding

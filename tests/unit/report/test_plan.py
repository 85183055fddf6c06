"""`sparsetrain plan`: what a run would take, from its YAML alone."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsetrain import cli
from sparsetrain.config import load_config
from sparsetrain.report.plan import plan_run

ROOT = Path(__file__).parents[3]
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_cluster_config_is_planned_whole(path: Path) -> None:
    config = load_config(path)
    plan = plan_run(config)

    assert [phase.name for phase in plan.phases] == [phase.name for phase in config.phases]
    assert plan.parameters.total > 1e9
    assert 0 < plan.bytes_a_rank.total < 141e9, "does not fit any GPU"


def test_gpt3_xl_has_its_published_size_and_what_sparsity_leaves() -> None:
    plan = plan_run(load_config(ROOT / "configs/clusters/spdf_gpt3_xl_deepspeed.yaml"))
    sparse, dense = plan.phases

    assert plan.parameters.total / 1e9 == pytest.approx(1.3, abs=0.05)
    assert plan.mesh == {"data": 8}
    assert (sparse.density, dense.density) == (0.25, 1.0)
    assert dense.flops_per_token == dense.dense_flops_per_token == sparse.dense_flops_per_token
    assert sparse.flops_per_token < dense.flops_per_token / 2
    # ZeRO-2: the whole model, and an eighth of its copy, of the gradients and of two moments, 4 bytes each.
    assert plan.bytes_a_rank.total == pytest.approx(4 * plan.parameters.total * (1 + 4 / 8), rel=1e-6)


def test_the_large_mixture_is_cut_in_three_ways_and_fits_gpus_of_80_gb() -> None:
    plan = plan_run(load_config(ROOT / "configs/clusters/moe_200b_megatron.yaml"))

    assert plan.mesh == {"data": 16, "tensor": 4, "pipeline": 8, "expert": 64}
    assert plan.parameters.total / 1e9 == pytest.approx(198, abs=0.5)
    assert plan.parameters.active / 1e9 == pytest.approx(16.4, abs=0.05)
    expert = 3 * 5120 * 4096 * 16  # weight, gradient and two moments
    assert 6 * expert < plan.bytes_a_rank.total < 12 * expert


def test_the_command_prints_mesh_sizes_and_phases() -> None:
    found = CliRunner().invoke(
        cli.app, ["plan", str(ROOT / "configs/deepspeed_tiny.yaml"), "cluster.workers=4"], env={"COLUMNS": "200"}
    )

    assert found.exit_code == 0, found.output
    for text in ("deepspeed", "4: data 4; experts over 4 ranks each", "optimizer", "FLOPs a token"):
        assert text in found.output


def test_a_run_that_does_not_fit_its_ranks_is_a_mistake_of_the_user() -> None:
    found = CliRunner().invoke(cli.app, ["plan", str(ROOT / "configs/deepspeed_tiny.yaml"), "cluster.workers=3"])

    assert found.exit_code == 2
    assert "which 3 ranks cannot share evenly" in found.output
    assert "Traceback" not in found.output

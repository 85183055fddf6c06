"""Runs of models with experts as a person starts them: one YAML, two processes, and what they say and leave behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsetrain import cli
from sparsetrain.config import dump_config
from sparsetrain.moe.placement import LoadTrace
from sparsetrain.testing import free_ports
from tests.training_runs import rows_of, tiny_config, write_corpus

TIMEOUT_S = 12
"""How long ranks wait for one that stands still; on a busy machine a healthy one may take some seconds."""
FSSDP = {"experts": "fssdp", "fssdp": {"reshard_every_steps": 3}}
MOE = {"num_experts": 4, "ffn_dim": 16}

STOPS_IN_A_COLLECTIVE = """
import os, signal, sys
import torch.distributed as dist

genuine, calls = dist.all_to_all_single, 0

def stopping(*args, **kwargs):
    global calls
    calls += 1
    if calls == 20:
        os.kill(os.getpid(), getattr(signal, {signal!r}))
    return genuine(*args, **kwargs)

if os.environ["RANK"] == "1":
    dist.all_to_all_single = stopping
from sparsetrain.cli import main
main()
"""
"""The command line, of which rank 1 is ended, or stopped, while it sends rows to experts."""

StartRanks = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """A run of 8 steps, with sparse experts."""
    write_corpus(tmp_path / "corpus")
    config = tiny_config(tmp_path, model__moe=MOE, train__phases=[], train__micro_batch_size=8, parallel=FSSDP)
    rule = config.sparsity[0].model_copy(update={"params": ("*.attention.*", "*.experts.*")})
    cluster = config.cluster.model_copy(update={"workers": 2})
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(config.model_copy(update={"sparsity": (rule,), "cluster": cluster})))
    return path


@pytest.fixture
def start_ranks() -> Iterator[StartRanks]:
    """Start the command line in two processes that form a group, as a launcher would; they are gone afterwards."""
    started = []

    def start(*command: str) -> list[subprocess.Popen[str]]:
        port = str(free_ports(1)[0])
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in "01":
            started.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def run(*arguments: str) -> tuple[int, str]:
    """The command line in this process, with no group around it: its exit code and all that it says."""
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
def test_two_ranks_train_sparse_experts_and_their_load_can_be_replayed(yaml: Path, start_ranks: StartRanks) -> None:
    first, second = start_ranks("-m", "sparsetrain", "train", str(yaml))
    told, silence = first.communicate(timeout=250)[0], second.communicate(timeout=250)[0]

    assert (first.returncode, second.returncode) == (0, 0), told + silence
    assert silence == ""
    for said in ("experts by FSSDP over 2", "expert max/mean", "rank max/mean", "a token uses", "fullest rank"):
        assert said in told
    output = yaml.parent / "run"
    for name in ("summary.json", "expert_load.npz", "expert_load.png", "loss.png"):
        assert (output / name).is_file()
        assert name in told or name.startswith(("summary", "expert_load.npz"))
    rows = rows_of(output)
    assert rows[-1]["density"] == pytest.approx(0.25, abs=0.01)
    assert max(row["replicas"] for row in rows) > 0

    replay = f"model.moe.router={{kind: replay, trace: {output / 'expert_load.npz'}}}"
    again = yaml.parent / "again"
    code, told = run(
        "train", str(yaml), "--in-process", "parallel.experts=null", "parallel.fssdp={}", replay, f"output={again}"
    )
    assert code == 0, told
    recorded, replayed = (LoadTrace.load(folder / "expert_load.npz") for folder in (output, again))
    assert (replayed.load_NLE == recorded.load_NLE).all()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_ranks_end_with_a_word_when_another_is_gone(yaml: Path, start_ranks: StartRanks, how: str) -> None:
    timeout = f"cluster.collective_timeout_s={TIMEOUT_S}"
    survivor, gone = start_ranks("-c", STOPS_IN_A_COLLECTIVE.format(signal=how), "train", str(yaml), timeout)
    told, _ = survivor.communicate(timeout=250)

    assert survivor.returncode == 2, told
    assert "Traceback" not in told
    *_, last = told.strip().splitlines()
    assert last.startswith(f"error: another rank has stopped, or did not come within {timeout}")
    assert re.search(r", while (gathering|exchanging rows with) the experts of layers\.\d", last)
    assert "--resume" in last
    gone.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.moe.top_k=5"], "model.moe.top_k=5: a token cannot use more experts than num_experts=4"),
        (["cluster.workers=8"], "parallel.ep = null: 8 ranks cannot share the 4 experts of a layer"),
        (["parallel.ep=2", "cluster.workers=3"], "parallel.ep=2: must divide the number of ranks, 3; 1 and 3 do"),
        (["model.moe=null"], "parallel.experts = fssdp: the model has no experts; add model.moe, or remove this key"),
        (["parallel.fssdp.pipeline=0"], "parallel.fssdp.pipeline=0: must be above 0"),
        (["--in-process", "parallel.fssdp.spare_slots=900000000"], "parallel.fssdp.spare_slots = 900000000: "),
        (["--in-process", "model.moe.router={kind: replay, trace: no.npz}"], "there is no load trace at no.npz"),
        (["--in-process", "model.moe.layers=[0, 5]"], "model.moe.layers=[0, 5]: there is no layer 5; num_layers=2"),
    ],
    ids=["top-k", "too-many-ranks", "ep", "no-experts", "pipeline", "memory", "no-trace", "no-layer"],
)
def test_a_mistake_is_told_in_a_line_before_anything_is_trained(
    yaml: Path, overrides: list[str], expected: str
) -> None:
    code, told = run("train", str(yaml), *overrides)

    assert code == 2
    assert expected in told
    assert "Traceback" not in told
    assert not (yaml.parent / "run").exists()

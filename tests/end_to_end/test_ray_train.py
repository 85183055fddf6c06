"""Training through a local Ray: the same numbers as without it, through the death of a worker, and nothing left."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ray  # noqa: F401  # isort: skip  # it brings psutil along
import psutil  # isort: skip

from sparsetrain.checkpoint import latest_checkpoint
from sparsetrain.cluster import run_on_ray
from sparsetrain.config import load_config
from sparsetrain.errors import RunFolderError
from sparsetrain.training.events import CheckpointSaved, Event, Notice, RunStarted
from sparsetrain.training.metrics import read_metrics

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

CONFIG = Path(__file__).parents[2] / "configs" / "quick.yaml"
TWO_WORKERS = ("cluster.workers=2", "train.tokens=60Ki", "train.sample_tokens=2", "checkpoint.every_steps=5")


def torchrun(*overrides: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, "-m", "sparsetrain", "train", "--in-process", str(CONFIG), *overrides], check=True, timeout=300
    )


def test_a_run_whose_worker_is_killed_resumes_and_ends_with_the_losses_of_torchrun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torchrun(*TWO_WORKERS, f"output={tmp_path / 'torchrun'}")
    before = set(psutil.Process().children())
    capfd.readouterr()
    config = load_config(CONFIG, [*TWO_WORKERS, f"output={tmp_path / 'ray'}"])
    events: list[Event] = []

    def watch(event: Event) -> None:
        events.append(event)
        if isinstance(event, CheckpointSaved) and event.step == 5:
            pid = re.search(r"rank 1 .* pid (\d+)", (tmp_path / "ray/logs/worker-1.log").read_text())
            assert pid is not None
            os.kill(int(pid[1]), signal.SIGKILL)

    summary = run_on_ray(config, reporter=watch)

    warnings = [event.message for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert len(warnings) == 1, warnings
    assert re.search(r"worker rank 1 died .* resuming from step \d+ \(1 of 3 restarts\)", warnings[0])
    starts = [event.resumed_from_step for event in events if isinstance(event, RunStarted)]
    assert starts[0] is None
    assert starts[1] >= 5
    rows, expected = (read_metrics(tmp_path / name) for name in ("ray", "torchrun"))
    assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert summary["final_loss"] == expected[-1]["loss"]
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", ""), "Ray is quiet"
    assert set(psutil.Process().children()) <= before, "nothing is left running"
    with pytest.raises(RunFolderError, match="--resume"):
        run_on_ray(config)


def test_ctrl_c_ends_everything_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsetrain", "train", str(CONFIG), f"output={tmp_path}", "train.tokens=100M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed = [next(process.stdout)]
    while not printed[-1].startswith("checkpoint at step"):
        printed.append(next(process.stdout))
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("RayTrainWorker" in name for name in command_lines(started))
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "--resume" in rest
    assert "Traceback" not in rest
    assert psutil.wait_procs(started, timeout=10)[1] == [], "nothing is left but what init has not buried yet"
    assert latest_checkpoint(tmp_path / "checkpoints") is not None


def command_lines(processes: list[psutil.Process]) -> list[str]:
    """Of those that have not ended meanwhile."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found

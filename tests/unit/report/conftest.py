import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparsetrain.training.events import EvalDone
from sparsetrain.training.metrics import MetricsWriter
from sparsetrain.training.summary import PhaseSummary, RunSummary


def loss_at(step: int) -> float:
    return 5.0 * math.exp(-step / 50)


def held_out(phase: str, step: int, when: str) -> EvalDone:
    return EvalDone(phase, step, when, loss_at(step), loss_at(step) / math.log(2), 100)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run's metrics: phases as (name, steps), pruned to half in the second half of the first."""

    def make(*phases: tuple[str, int], evaluate: bool = True, dense: bool = False) -> Path:
        step = 0
        with MetricsWriter(tmp_path, None) as metrics:
            for index, (name, num_steps) in enumerate(phases):
                if evaluate:
                    metrics.evaluation(held_out(name, step, "start"))
                for done in range(num_steps):
                    step += 1
                    pruned = not dense and index == 0 and done >= num_steps // 2
                    metrics.step(
                        {
                            "step": step,
                            "phase": name,
                            "tokens": 64 * step,
                            "loss": math.nan if step == 7 else loss_at(step),
                            "density": 0.5 if pruned else 1.0,
                            "step_time_s": 0.7 if pruned else 0.5,
                        }
                    )
                if evaluate:
                    metrics.evaluation(held_out(name, step, "end"))
        return tmp_path

    return make


@pytest.fixture
def make_summary() -> Callable[..., RunSummary]:
    """The summary of a run of two phases; keyword arguments replace its figures."""

    def make(**changes: object) -> RunSummary:
        sparse = PhaseSummary("sparse-pretrain", 3_997_696, 244, 170.8, 8.003, 2.598, 0.25, 5.2e13, 8.2e13, 8.2e13)
        dense = PhaseSummary("dense-finetune", 1_015_808, 62, 43.4, 3.247, 2.769, 1.0, 2.1e13, 2.1e13, 2.1e13)
        figures: dict[str, object] = {
            "final_loss": 1.7,
            "eval_loss": 1.92,
            "eval_bits_per_byte": 2.769,
            "tokens": 5_013_504,
            "tokens_per_s": 23_100.0,
            "mfu": 0.412,
            "density": 1.0,
            "n_avg": 1_812_333.0,
            "train_flops": 7.3e13,
            "executed_flops": 1.03e14,
            "dense_train_flops": 1.03e14,
            "phases": (sparse, dense),
            "seconds": 214.2,
        }
        return RunSummary(**{**figures, **changes})

    return make

"""From what a run has added up to the figures of summary.json."""

from collections.abc import Sequence

from sparsetrain.config import RunConfig
from sparsetrain.planning.flops import ParameterCount
from sparsetrain.training.metrics import Row, mfu
from sparsetrain.training.state import PhaseTotals, RunState
from sparsetrain.training.summary import (
    ExpertSummary,
    PhaseSummary,
    RunSummary,
    SparseLayerSummary,
    StepTimes,
    measured_seconds_saved,
)


def summarize(
    config: RunConfig,
    state: RunState,
    rows: Sequence[Row],
    *,
    parameters: ParameterCount,
    peak_flops: float,
    sample: str | None,
) -> RunSummary:
    """Work out a finished run's figures.

    Args:
        config: The run.
        state: Its sums, all phases done.
        rows: metrics.jsonl, for the comparison of dense with sparse steps.
        parameters: Of the model.
        peak_flops: Matmul peak of all ranks together, FLOP/s.
        sample: Text that the trained model wrote.
    """
    totals = state.totals
    seconds = sum(phase.seconds for phase in totals)
    steps = sum(phase.steps for phase in totals)
    executed = sum(phase.executed_flops for phase in totals)
    dense = sum(phase.dense_train_flops for phase in totals)
    times = StepTimes.compare(rows)
    return RunSummary(
        final_loss=state.final_loss,
        eval_loss=state.eval_loss,
        eval_bits_per_byte=totals[-1].eval_after,
        tokens=state.tokens,
        tokens_per_s=state.tokens / seconds if seconds else 0.0,
        mfu=mfu(sum(phase.model_flops for phase in totals), seconds, peak_flops),
        density=totals[-1].density,
        n_avg=sum(phase.nonzero_steps for phase in totals) / max(1, steps),
        train_flops=sum(phase.train_flops for phase in totals),
        executed_flops=executed,
        dense_train_flops=dense,
        attention_flops_saved=sum(phase.attention_flops_saved for phase in totals),
        phases=tuple(_phase(phase.name, part) for phase, part in zip(config.phases, totals, strict=True)),
        seconds=seconds,
        seconds_saved=measured_seconds_saved(times, executed_flops=executed, dense_train_flops=dense),
        sample=sample,
        bad_steps=state.bad_steps,
        resumed=state.resumed,
        parameters=parameters.total,
        active_parameters=parameters.active,
        experts=_experts(rows),
    )


def _experts(rows: Sequence[Row]) -> ExpertSummary | None:
    """Means over the steps that say something of experts."""
    told = [row for row in rows if row.get("expert_imbalance") is not None]
    if not told:
        return None

    def mean(key: str) -> float:
        return float(sum(row[key] for row in told) / len(told))

    return ExpertSummary(
        expert_imbalance=mean("expert_imbalance"),
        device_imbalance=mean("device_imbalance"),
        replicas=mean("replicas"),
        moved_bytes=mean("moved_bytes"),
        dropped_tokens=sum(row["dropped_tokens"] for row in told),
    )


def _phase(name: str, totals: PhaseTotals) -> PhaseSummary:
    return PhaseSummary(
        name=name,
        tokens=totals.tokens,
        steps=totals.steps,
        seconds=totals.seconds,
        eval_before=totals.eval_before,
        eval_after=totals.eval_after,
        density=totals.density,
        layer_density=totals.layer_density,
        sparse_layers=tuple(
            SparseLayerSummary(**{**row, "shape": tuple(row["shape"])}) for row in totals.sparse_layers
        ),
        train_flops=totals.train_flops,
        executed_flops=totals.executed_flops,
        dense_train_flops=totals.dense_train_flops,
    )

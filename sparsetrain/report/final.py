"""What a run came to, as a table on the terminal: every figure in it was measured or counted in that run."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparsetrain.report.expert_load import LOAD_PLOT_FILE
from sparsetrain.report.plot import PLOT_FILE
from sparsetrain.training.formatting import MISSING, duration, number, percent, quantity, scaled
from sparsetrain.training.metrics import read_metrics
from sparsetrain.training.run_folder import ATTENTION_PLOT_FILE
from sparsetrain.training.summary import ExpertSummary, PhaseSummary, RunSummary, StepTimes

_SAMPLE_LINES = 16
_PICTURES = (("losses", PLOT_FILE), ("load of experts", LOAD_PLOT_FILE), ("who sees what", ATTENTION_PLOT_FILE))


def print_summary(folder: Path, console: Console) -> None:
    """Print a finished run's phases, savings, speed, a generated sample and where everything is.

    Args:
        folder: A run folder with summary.json and metrics.jsonl.
        console: Where to print.

    Raises:
        RunFolderError: The run has not finished, or its files are damaged.
    """
    folder = Path(folder)
    summary = RunSummary.load(folder)
    times = StepTimes.compare(read_metrics(folder))
    console.print()
    console.print(_phases(summary))
    console.print(_figures(summary, times))
    for phase in summary.phases:
        if phase.sparse_layers:
            console.print(_sparse_layers(phase))
    if summary.sample:
        console.print(Padding(Text("what it writes now", style="dim"), (1, 0, 0, 1)))
        console.print(Padding(Text(_excerpt(summary.sample), style="cyan"), (0, 0, 0, 3)))
    console.print()
    where = Text.assemble((" run folder      ", "dim"), (str(folder), "bold"))
    for what, name in _PICTURES:
        if (folder / name).exists():
            where.append(f"\n {what:<16}{folder / name}", style="dim")
    console.print(where, soft_wrap=True)


def _phases(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1))
    table.add_column(" phase")
    for name in ("tokens", "time", "held-out bits/byte", "density", "FLOPs saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in summary.phases:
        table.add_row(
            f" {phase.name}",
            scaled(phase.tokens),
            duration(phase.seconds),
            Text.assemble(f"{number(phase.eval_before, '.3f')} → ", (number(phase.eval_after, ".3f"), "bold")),
            number(phase.density, ".3f"),
            _saved(phase),
        )
    return table


def _sparse_layers(phase: PhaseSummary) -> Table:
    """Which kernels multiplied with zeros in place, and what that spared."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1))
    table.add_column(f" zeros in {phase.name}")
    for name in ("pattern", "kernel", "dense", "chosen", "skipped"):
        table.add_column(name, justify="right")
    for row in phase.sparse_layers:
        table.add_row(
            f" {row.count} x {row.weights.removesuffix('.weight')}",
            row.pattern,
            row.implementation,
            *(
                MISSING if seconds is None else f"{1e3 * seconds:.3g} ms"
                for seconds in (row.dense_seconds, row.sparse_seconds)
            ),
            percent(row.flops_skipped),
        )
    return table


def _figures(summary: RunSummary, times: StepTimes | None) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row(" FLOPs saved, nominal", _flops_saved(summary))
    table.add_row(" seconds saved, measured", _seconds_saved(summary))
    if times is not None:
        noise = " (same work, so noise)" if summary.multiplied_zeros else ""
        table.add_row(" median step", f"{_step(times.dense_s)} dense, {_step(times.sparse_s)} with zeros{noise}")
    table.add_row(" speed", f"{scaled(summary.tokens_per_s)} tokens/s, MFU {percent(summary.mfu)} of the measured peak")
    table.add_row(" N_avg", f"{scaled(summary.n_avg)} non-zero linear parameters, mean over steps")
    if summary.attention_flops_saved:
        table.add_row(" sparse attention", _attention_saved(summary))
    if summary.experts is not None:
        _add_experts(table, summary, summary.experts)
    if summary.bad_steps:
        skipped = f"{summary.bad_steps}, because loss or gradient was not finite"
        table.add_row(" steps skipped", Text(skipped, style="yellow"))
    return table


def _add_experts(table: Table, summary: RunSummary, experts: ExpertSummary) -> None:
    if summary.parameters and summary.active_parameters:
        share = percent(summary.active_parameters / summary.parameters, 0)
        a_token = f"{scaled(summary.active_parameters)} of {scaled(summary.parameters)} parameters ({share})"
        table.add_row(" a token uses", a_token)
    balance = f"fullest expert {experts.expert_imbalance:.2f} x the mean, fullest rank {experts.device_imbalance:.2f} x"
    table.add_row(" load, mean over steps", balance)
    if experts.moved_bytes:
        moved = quantity(experts.moved_bytes, "B")
        table.add_row(" experts on the wire", f"{moved} a step for {scaled(experts.replicas)} replicas and new owners")
    if experts.dropped_tokens:
        dropped = f"{experts.dropped_tokens} assignments exceeded an expert's capacity"
        table.add_row(" dropped", Text(dropped, style="yellow"))


def _saved(figures: RunSummary | PhaseSummary) -> str:
    if not figures.dense_train_flops:
        return MISSING
    return percent(1.0 - figures.train_flops / figures.dense_train_flops)


def _flops_saved(summary: RunSummary) -> str:
    spent, dense = scaled(summary.train_flops), scaled(summary.dense_train_flops)
    return f"{_saved(summary)}: {spent} of {dense} FLOPs, zeros not counted"


def _attention_saved(summary: RunSummary) -> str:
    saved, all_flops = summary.attention_flops_saved, summary.dense_train_flops + summary.attention_flops_saved
    return f"saves {percent(saved / all_flops)} of the {scaled(all_flops)} FLOPs with dense attention"


def _seconds_saved(summary: RunSummary) -> str:
    """Say what the zeros saved on the clock; where the kernels multiply zeros, the clock's noise is not a saving."""
    if summary.train_flops >= summary.dense_train_flops:
        return "none: no weight was zero"
    if summary.multiplied_zeros:
        return "none: dense kernels multiply the zeros, too"
    if summary.seconds_saved is None:
        return "not known: this run has no dense steps to compare with"
    without = duration(summary.seconds + summary.seconds_saved)
    return f"{summary.seconds_saved:.1f} s: {duration(summary.seconds)} of training instead of {without}"


def _step(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _excerpt(sample: str) -> str:
    """The first lines, without control characters that would move the cursor or ring the bell."""
    lines = "".join(char if char.isprintable() or char in "\n\t" else "�" for char in sample).expandtabs(4).splitlines()
    more = ["…"] if len(lines) > _SAMPLE_LINES else []
    return "\n".join(lines[:_SAMPLE_LINES] + more)

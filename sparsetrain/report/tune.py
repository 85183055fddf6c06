"""`sparsetrain doctor --tune`: measure the kernels on this machine, so that each call runs the fastest."""

from collections.abc import Sequence

import sparsetrain_kernels  # noqa: F401 - its operations register themselves
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sparsetrain_kernels.dispatch import Tuned, tune

from sparsetrain.errors import ConfigError


def tune_kernels(console: Console, *, operations: Sequence[str], limit_s: float, threads: int | None) -> None:
    """Measure for at most about `limit_s` seconds, keep the times in the user's cache folder, and say what was done.

    Args:
        console: Where to show progress.
        operations: What names of operations begin with; none: all of them.
        limit_s: Seconds after which no further problem is begun.
        threads: Threads of a CPU, which the times hold for; by default those that torch uses.

    Raises:
        ConfigError: An option has a value that makes no sense.
    """
    if limit_s <= 0:
        raise ConfigError(f"--minutes {limit_s / 60:g} leaves no time to measure in; give more than 0")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads} cannot run anything; give 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    columns = (
        TextColumn("{task.percentage:>3.0f} %"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=limit_s)

            def report(line: str, done: int, wanted: int) -> None:
                elapsed = progress.tasks[0].elapsed or 0.0
                share = max(done / wanted, min(1.0, elapsed / limit_s))
                progress.update(task, completed=share * limit_s, description=escape(line.partition(":")[0]))

            tuned = tune(device, operations or None, repeats=5, limit_s=limit_s, report=report)
        _say(console, tuned, device)
    except ValueError as error:
        raise ConfigError(f"--only: {error}") from None
    finally:
        torch.set_num_threads(before)


def _say(console: Console, tuned: Tuned, device: str) -> None:
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else "the GPU"
    lines = [f"measured {tuned.measured} of {tuned.wanted} problems on {where}", f"written to {tuned.path}"]
    if tuned.measured < tuned.wanted:
        lines.insert(1, "of the others what was known stays; more --minutes measure more of them")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)

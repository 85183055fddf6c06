"""`sparsetrain train`: a run here or on a Ray cluster, watched to its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsetrain.cli.arguments import ConfigPath, Overrides, Overwrite, Resume, load_run, located, on_existing_run
from sparsetrain.cli.torchrun import told_by_rank_0, torchrun_rank, torchrun_ranks
from sparsetrain.errors import ConfigError

if TYPE_CHECKING:
    from sparsetrain.config import RunConfig
    from sparsetrain.training.events import Event


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Train in this process, without Ray; implied under torchrun.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Join this Ray cluster (HOST:PORT or auto) instead of starting one here."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved run as YAML, and exit.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a torch.profiler trace of a few steps into the run folder.")
    ] = False,
    event_lines: Annotated[
        bool, typer.Option("--event-lines", hidden=True, help="Print events as JSON, for `submit` to show.")
    ] = False,
) -> None:
    """Train the run that a YAML file describes, here or on a Ray cluster.

    For example: `sparsetrain train configs/demo.yaml train.tokens=2M cluster.workers=4`
    """
    ranks = torchrun_ranks()
    here = in_process or ranks is not None
    if here and address is not None:
        raise ConfigError("--in-process and torchrun use no Ray, so --address has no meaning here; give one of the two")
    on_existing = on_existing_run(resume, overwrite)
    with told_by_rank_0():
        run = load_run(config, overrides, world_size=(ranks or 1) if here else None)
    if print_config:
        from sparsetrain.config import dump_config

        typer.echo(dump_config(run), nl=False)
        return
    if in_process and ranks is None and run.cluster.workers > 1:
        typer.echo(f"note: --in-process is one rank; cluster.workers = {run.cluster.workers} is not used")
    if here:
        from sparsetrain.training import train as train_here

        start = partial(train_here, run, on_existing=on_existing, profile=profile)
    else:
        from sparsetrain.cluster import run_on_ray

        start = partial(run_on_ray, run, address=address, on_existing=on_existing, profile=profile)
    with located(config, overrides):
        _watch(run, start, check_as=(ranks or 1) if here else None, event_lines=event_lines)


def _watch(run: "RunConfig", start: Callable[..., Any], *, check_as: int | None, event_lines: bool) -> None:
    """Check the run, `start(reporter=...)` it, and print the table at the end; only rank 0 shows anything.

    Args:
        run: The run.
        start: Trains.
        check_as: Number of ranks to check for; None where `start` checks the run itself.
        event_lines: Print events for another process to show, instead of showing them.
    """
    from sparsetrain.report.attention_layouts import plot_attention_layouts
    from sparsetrain.training import preflight
    from sparsetrain.training.events import DataProgress, Event, RunStarted
    from sparsetrain.training.progress import ProgressDisplay

    if torchrun_rank() != 0:
        with told_by_rank_0():
            preflight(run, world_size=check_as)
        start(reporter=None)
        return
    folders: list[Path] = []

    def report(event: Event) -> None:
        if isinstance(event, RunStarted):
            folders.append(Path(event.folder))
            plot_attention_layouts(folders[-1])
        display(event)

    console = Console()
    with _event_line_display() if event_lines else ProgressDisplay(console) as display:
        if check_as is not None:
            preflight(run, world_size=check_as, on_progress=lambda *progress: display(DataProgress(*progress)))
        start(reporter=report)
    if folders and (folders[-1] / "summary.json").is_file():  # on a remote cluster it may not be seen from here
        _show_results(folders[-1], console)


def _show_results(folder: Path, console: Console) -> None:
    from sparsetrain.report.expert_load import plot_expert_load
    from sparsetrain.report.final import print_summary
    from sparsetrain.report.plot import plot_loss

    plot_loss(folder)
    plot_expert_load(folder)
    print_summary(folder, console)


@contextmanager
def _event_line_display() -> Iterator[Callable[["Event"], None]]:
    """Takes the place of the display where events are printed for another process to show."""
    from sparsetrain.cluster.event_lines import EventLineWriter

    yield EventLineWriter(partial(print, end="", flush=True))

"""`sparsetrain plan`, `data` and `doctor`: what can be known, and be made ready, before a run."""

from typing import Annotated

import typer
from rich.console import Console

from sparsetrain.cli.arguments import ConfigPath, Overrides, load_run, located
from sparsetrain.cli.exit_codes import MISTAKE
from sparsetrain.errors import ConfigError


def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Say what a run would take: the mesh, the model's size, bytes a rank holds, FLOPs. Starts nothing."""
    run = load_run(config, overrides)
    from sparsetrain.report.plan import print_plan

    with located(config, overrides):
        print_plan(run, Console())


def data(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build a run's token shards, if they are not there yet, and say what is in them."""
    run = load_run(config, overrides)
    from sparsetrain.data import describe
    from sparsetrain.training.datasets import prepare_datasets
    from sparsetrain.training.progress import ProgressDisplay

    with ProgressDisplay(Console()) as display:
        datasets = prepare_datasets(run, on_progress=display.data_progress)
    for phase, dataset in zip(run.phases, datasets, strict=True):
        typer.echo("\n".join([phase.name, *(f"  {line}" for line in describe(dataset)), ""]))


def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at all nodes of a Ray cluster instead of at this machine.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The cluster: HOST:PORT, auto, or http://HOST:8265 from anywhere else."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time the kernels here, so that each call runs the fastest.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="With --tune: how long to measure.")] = 2.0,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --tune: operations, or how their names begin; may be repeated."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="With --tune: threads that the times hold for [default: torch's own].")
    ] = None,
) -> None:
    """Show what this machine has, and what each engine and kernel will use; or what is wrong with a cluster's nodes."""
    if tune:
        from sparsetrain.report.tune import tune_kernels

        tune_kernels(Console(), operations=only or (), limit_s=60 * minutes, threads=threads)
        return
    if cluster:
        _check_cluster(address)
        return
    if address is not None:
        raise ConfigError("--address names a cluster to look at; add --cluster")
    from sparsetrain.report.doctor import print_doctor

    print_doctor(Console())


def _check_cluster(address: str | None) -> None:
    from sparsetrain.cluster import check_cluster, submit_checkup

    if address is not None and address.startswith(("http://", "https://")):
        submit_checkup(address)
    elif not check_cluster(address, Console()):
        raise typer.Exit(MISTAKE)

"""`sparsetrain submit` and `sparsetrain jobs`: runs that train as jobs of a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from sparsetrain.cli.arguments import ConfigPath, Overrides, Overwrite, Resume, load_run, on_existing_run

if TYPE_CHECKING:
    from sparsetrain.training.events import Event


def submit(
    config: ConfigPath,
    address: Annotated[
        str, typer.Option(metavar="URL", help="The cluster's job server: http://HOST:8265", show_default=False)
    ],
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return as soon as the cluster has the job; do not follow its output.")
    ] = False,
) -> None:
    """Hand a run to a Ray cluster as a job, and watch it: this package and the YAML travel with it.

    A cluster with token authentication wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH).
    """
    on_existing = on_existing_run(resume, overwrite)
    run = load_run(config, overrides)
    from sparsetrain.cluster import submit as submit_run

    if detach:
        job = submit_run(run, address=address, detach=True, on_existing=on_existing)
        typer.echo(f"submitted as {job}; watch it: sparsetrain jobs logs --address {address} {job}")
        return
    with _following() as (display, write):
        submit_run(run, address=address, on_existing=on_existing, reporter=display, write=write)


app = typer.Typer(help="The jobs of a Ray cluster: list them, watch one, stop one.", no_args_is_help=True)

JobName = Annotated[str, typer.Argument(metavar="JOB", help="As `jobs list` names it.", show_default=False)]
JobServerAddress = Annotated[
    str,
    typer.Option("--address", metavar="URL", help="The job server; auto: $RAY_API_SERVER_ADDRESS, or this machine."),
]


@app.command(name="list")
def list_jobs(address: JobServerAddress = "auto") -> None:
    """List the cluster's jobs, the newest first."""
    from sparsetrain.cluster import JobServer, print_jobs

    print_jobs(JobServer(address).list(), Console())


@app.command()
def status(job: JobName, address: JobServerAddress = "auto") -> None:
    """Say how a job is doing, what it runs and where it writes."""
    from sparsetrain.cluster import JobServer, print_job

    print_job(JobServer(address).details(job), Console())


@app.command()
def logs(
    job: JobName,
    address: JobServerAddress = "auto",
    follow: Annotated[bool, typer.Option(help="Watch the job until it ends; --no-follow: only what there is.")] = True,
) -> None:
    """Show a job's output from its beginning, as `submit` does."""
    from sparsetrain.cluster import JobServer, follow_job, print_log

    server = JobServer(address)
    with _following() as (display, write):
        (follow_job if follow else print_log)(server, job, reporter=display, write=write)


@app.command()
def stop(job: JobName, address: JobServerAddress = "auto") -> None:
    """Stop a job and wait until it has ended; its last checkpoint stays."""
    from sparsetrain.cluster import JobServer

    typer.echo(f"{job}: {JobServer(address).stop(job).lower()}")


@contextmanager
def _following() -> Iterator[tuple[Callable[["Event"], None], Callable[[str], None]]]:
    """What shows the events, and what prints the other lines, of a run that trains elsewhere."""
    from sparsetrain.training.progress import ProgressDisplay

    console = Console()

    def write(line: str) -> None:
        console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)

    with ProgressDisplay(console) as display:
        yield display, write

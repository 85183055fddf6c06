"""The command line. Each command imports what it needs when it runs, so that a mistake in a YAML is told at once."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from sparsetrain.config import InvalidConfig, Problem, RunConfig, dump_config, load_config, locate
from sparsetrain.config.origin import FilePosition
from sparsetrain.errors import ConfigError, SparsetrainError

if TYPE_CHECKING:
    from sparsetrain.training.events import Event

_OK, _BUG, _MISTAKE, _INTERRUPTED = 0, 1, 2, 130
_MAX_EXCERPTS = 10

_HELP = """Pre-train sparse language models from one YAML file.

Three ways in:

1. Here: `sparsetrain train configs/demo.yaml` starts Ray on this machine, with as many workers as the YAML says
(`--in-process`: without Ray; `torchrun --nproc-per-node 2 -m sparsetrain train ...` works too).

2. On a cluster: `sparsetrain submit configs/demo.yaml --address http://HOST:8265` hands the run to a Ray cluster, or
`sparsetrain train ... --address HOST:6379` drives it from here.

3. From Python: `import sparsetrain`, for your own model and training loop.

Anything in the YAML can be changed on the command line: `train.tokens=2M sparsity.0.sparsity=0.5`."""


class _Commands(typer.core.TyperGroup):
    """Turns what a person got wrong into one message and exit code 2, and Ctrl-C into one line and 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except SparsetrainError as error:
            _show_error(error)
            raise typer.Exit(_MISTAKE) from None
        except KeyboardInterrupt:
            hint = "; add --resume to go on from the last checkpoint" if ctx.invoked_subcommand == "train" else ""
            typer.echo(f"interrupted{hint}", err=True)
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the YAML: train.tokens=2M", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the output folder holds.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run that the output folder holds, and start anew.")
]
RunFolderPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: runs/demo", show_default=False)]


def main() -> None:
    """Entry point of `sparsetrain` and `python -m sparsetrain`."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        print("\nThis is a bug in sparsetrain; please report it together with the lines above.", file=sys.stderr)
        sys.exit(_BUG)


def _show_version(wanted: bool) -> None:
    if wanted:
        import sparsetrain

        typer.echo(f"sparsetrain {sparsetrain.__version__}")
        raise typer.Exit(_OK)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
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
    ranks = _torchrun_ranks()
    here = in_process or ranks is not None
    if here and address is not None:
        raise ConfigError("--in-process and torchrun use no Ray, so --address has no meaning here; give one of the two")
    on_existing = _on_existing(resume, overwrite)
    run = _load(config, overrides, world_size=(ranks or 1) if here else None)
    if print_config:
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
    try:
        _watch(run, start, check_as=(ranks or 1) if here else None, event_lines=event_lines)
    except InvalidConfig as error:
        raise locate(error, config, overrides or ()) from None


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Say what a run would take: the mesh, the model's size, bytes a rank holds, FLOPs. Starts nothing."""
    run = _load(config, overrides)
    from sparsetrain.report.plan import print_plan

    try:
        print_plan(run, Console())
    except InvalidConfig as error:
        raise locate(error, config, overrides or ()) from None


@app.command()
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
    on_existing = _on_existing(resume, overwrite)
    run = _load(config, overrides)
    from sparsetrain.cluster import submit as submit_run

    if detach:
        job = submit_run(run, address=address, detach=True, on_existing=on_existing)
        typer.echo(f"submitted as {job}; watch it: sparsetrain jobs logs --address {address} {job}")
        return
    with _following() as (display, write):
        submit_run(run, address=address, on_existing=on_existing, reporter=display, write=write)


jobs = typer.Typer(help="The jobs of a Ray cluster: list them, watch one, stop one.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

JobName = Annotated[str, typer.Argument(metavar="JOB", help="As `jobs list` names it.", show_default=False)]
JobServerAddress = Annotated[
    str,
    typer.Option("--address", metavar="URL", help="The job server; auto: $RAY_API_SERVER_ADDRESS, or this machine."),
]


@jobs.command(name="list")
def list_jobs(address: JobServerAddress = "auto") -> None:
    """List the cluster's jobs, the newest first."""
    from sparsetrain.cluster import JobServer, print_jobs

    print_jobs(JobServer(address).list(), Console())


@jobs.command(name="status")
def job_status(job: JobName, address: JobServerAddress = "auto") -> None:
    """Say how a job is doing, what it runs and where it writes."""
    from sparsetrain.cluster import JobServer, print_job

    print_job(JobServer(address).details(job), Console())


@jobs.command(name="logs")
def job_logs(
    job: JobName,
    address: JobServerAddress = "auto",
    follow: Annotated[bool, typer.Option(help="Watch the job until it ends; --no-follow: only what there is.")] = True,
) -> None:
    """Show a job's output from its beginning, as `submit` does."""
    from sparsetrain.cluster import JobServer, follow_job, print_log

    server = JobServer(address)
    with _following() as (display, write):
        (follow_job if follow else print_log)(server, job, reporter=display, write=write)


@jobs.command(name="stop")
def stop_job(job: JobName, address: JobServerAddress = "auto") -> None:
    """Stop a job and wait until it has ended; its last checkpoint stays."""
    from sparsetrain.cluster import JobServer

    typer.echo(f"{job}: {JobServer(address).stop(job).lower()}")


@app.command(name="eval")
def evaluate(run: RunFolderPath) -> None:
    """Measure the held-out loss of a run's last checkpoint, on each phase's data."""
    from sparsetrain.training import evaluate_run

    for phase, result in evaluate_run(run).items():
        typer.echo(
            f"{phase}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte ({result.num_tokens} held-out tokens)"
        )


@app.command()
def export(
    run: RunFolderPath,
    to: Annotated[Path, typer.Option(metavar="FILE", help="The file to write: model.safetensors", show_default=False)],
    names: Annotated[
        Literal["hugging-face", "ours"], typer.Option(help="Whose names the weights have, and whose shapes.")
    ] = "hugging-face",
) -> None:
    """Write the weights of a run's last checkpoint into one file, zeros in place."""
    from sparsetrain.training import export_run

    total, nonzero = export_run(run, to, names=names)
    typer.echo(f"{to}: {total} weights, {nonzero} of them not zero")


@app.command()
def generate(
    run: RunFolderPath,
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many of the likeliest tokens; 0: from all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")] = 0,
) -> None:
    """Write text with a run's last checkpoint."""
    from sparsetrain.training import generate_text

    text = generate_text(run, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k or None, seed=seed)
    typer.echo(prompt + "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text))


@app.command()
def data(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build a run's token shards, if they are not there yet, and say what is in them."""
    run = _load(config, overrides)
    from sparsetrain.data import describe
    from sparsetrain.training.datasets import prepare_datasets
    from sparsetrain.training.progress import ProgressDisplay

    with ProgressDisplay(Console()) as display:
        datasets = prepare_datasets(run, on_progress=display.data_progress)
    for phase, dataset in zip(run.phases, datasets, strict=True):
        typer.echo("\n".join([phase.name, *(f"  {line}" for line in describe(dataset)), ""]))


@app.command()
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
        raise typer.Exit(_MISTAKE)


@contextmanager
def _following() -> Iterator[tuple[Callable[["Event"], None], Callable[[str], None]]]:
    """What shows the events, and what prints the other lines, of a run that trains elsewhere."""
    from sparsetrain.training.progress import ProgressDisplay

    console = Console()

    def write(line: str) -> None:
        console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)

    with ProgressDisplay(console) as display:
        yield display, write


def _load(config: str, overrides: Sequence[str] | None, *, world_size: int | None = None) -> RunConfig:
    if "=" in config and not Path(config).exists():
        raise ConfigError(f"the YAML file comes first, then changes to it such as {config}")
    with _muted() if _rank() else nullcontext():
        return load_config(config, overrides or (), world_size=world_size)


def _on_existing(resume: bool, overwrite: bool) -> Literal["refuse", "resume", "overwrite"]:
    if resume and overwrite:
        raise ConfigError("--resume keeps what --overwrite deletes; give one of the two")
    return "resume" if resume else "overwrite" if overwrite else "refuse"


def _torchrun_ranks() -> int | None:
    """The number of ranks that torchrun started, or None outside of it."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def _rank() -> int:
    return int(os.environ["RANK"]) if _torchrun_ranks() is not None else 0


def _watch(run: RunConfig, start: Callable[..., Any], *, check_as: int | None, event_lines: bool) -> None:
    """Check the run, `start(reporter=...)` it, and print the table at the end; only rank 0 shows anything.

    Args:
        run: The run.
        start: Trains.
        check_as: Number of ranks to check for; None where `start` checks the run itself.
        event_lines: Print events for another process to show, instead of showing them.
    """
    from sparsetrain.report.attention_layouts import plot_attention_layouts
    from sparsetrain.report.expert_load import plot_expert_load
    from sparsetrain.report.final import print_summary
    from sparsetrain.report.plot import plot_loss
    from sparsetrain.training import preflight
    from sparsetrain.training.events import DataProgress, Event, RunStarted
    from sparsetrain.training.progress import ProgressDisplay

    if _rank() != 0:
        with _muted():
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
        plot_loss(folders[-1])
        plot_expert_load(folders[-1])
        print_summary(folders[-1], console)


@contextmanager
def _event_line_display() -> Iterator[Callable[["Event"], None]]:
    """Takes the place of the display where events are printed for another process to show."""
    from sparsetrain.cluster.event_lines import EventLineWriter

    yield EventLineWriter(partial(print, end="", flush=True))


@contextmanager
def _muted() -> Iterator[None]:
    """End without a word on an error of the user's that rank 0 meets and tells, too."""
    try:
        yield
    except SparsetrainError:
        raise typer.Exit(_MISTAKE) from None


def _show_error(error: SparsetrainError) -> None:
    """Print an error of the user's: for a bad YAML each problem with the line that it is about."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    name = f"error (rank {_rank()}): " if _rank() else "error: "
    if not isinstance(error, InvalidConfig):
        console.print(Text(name, "bold red").append(str(error), "default"))
        return
    console.print(Text(name, "bold red").append(str(error).partition("\n")[0], "bold default"))
    for problem in error.problems:
        console.print(_problem_line(problem))
        where = problem.where
        if isinstance(where, FilePosition) and where.source_line and len(error.problems) <= _MAX_EXCERPTS:
            console.print(_excerpt(where))


def _problem_line(problem: Problem) -> Text:
    """The line of a problem, with what is to be changed standing out."""
    line, message = str(problem), problem.message
    return Text(line.removesuffix(message), "bold").append(message, "not bold")


def _excerpt(where: FilePosition) -> Text:
    """The line of the YAML that is to blame, underlined."""
    number = f"{where.line:>5} | "
    gap = " " * (len(number) - 2) + "| " + " " * (where.column - 1)
    marks = "^" * min(where.width, max(1, len(where.source_line) - where.column + 1))
    return Text(number, "blue").append(where.source_line, "default").append(f"\n{gap}", "blue").append(marks, "red")

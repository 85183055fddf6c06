"""The program `sparsetrain`: its commands, and how it ends."""

import sys
import traceback
from typing import Annotated, Any

import typer

from sparsetrain.cli import before, jobs, results
from sparsetrain.cli.exit_codes import BUG, INTERRUPTED, MISTAKE, OK
from sparsetrain.cli.mistakes import show_error
from sparsetrain.cli.train import train
from sparsetrain.errors import SparsetrainError

HELP = """Pre-train sparse language models from one YAML file.

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
            show_error(error)
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            hint = "; add --resume to go on from the last checkpoint" if ctx.invoked_subcommand == "train" else ""
            typer.echo(f"interrupted{hint}", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `sparsetrain` and `python -m sparsetrain`."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        print("\nThis is a bug in sparsetrain; please report it together with the lines above.", file=sys.stderr)
        sys.exit(BUG)


def _show_version(wanted: bool) -> None:
    if wanted:
        import sparsetrain

        typer.echo(f"sparsetrain {sparsetrain.__version__}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


app.command()(train)
app.command()(before.plan)
app.command()(jobs.submit)
app.add_typer(jobs.app, name="jobs")
app.command(name="eval")(results.evaluate)
app.command()(results.export)
app.command()(results.generate)
app.command()(before.data)
app.command()(before.doctor)

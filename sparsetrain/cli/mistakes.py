"""How a mistake of the user's is shown: for a bad YAML each problem, with the line that it is about."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sparsetrain.cli.torchrun import torchrun_rank
from sparsetrain.errors import SparsetrainError

if TYPE_CHECKING:
    from sparsetrain.config import Problem
    from sparsetrain.config.origin import FilePosition

MAX_EXCERPTS = 10
"""With more problems than this, none is shown with its line: the first would scroll away."""


def show_error(error: SparsetrainError) -> None:
    """Print an error of the user's to stderr."""
    from sparsetrain.config import InvalidConfig
    from sparsetrain.config.origin import FilePosition

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    name = f"error (rank {torchrun_rank()}): " if torchrun_rank() else "error: "
    if not isinstance(error, InvalidConfig):
        console.print(Text(name, "bold red").append(str(error), "default"))
        return
    console.print(Text(name, "bold red").append(str(error).partition("\n")[0], "bold default"))
    for problem in error.problems:
        console.print(_problem_line(problem))
        where = problem.where
        if isinstance(where, FilePosition) and where.source_line and len(error.problems) <= MAX_EXCERPTS:
            console.print(_excerpt(where))


def _problem_line(problem: "Problem") -> Text:
    """The line of a problem, with what is to be changed standing out."""
    line, message = str(problem), problem.message
    return Text(line.removesuffix(message), "bold").append(message, "not bold")


def _excerpt(where: "FilePosition") -> Text:
    """The line of the YAML that is to blame, underlined."""
    number = f"{where.line:>5} | "
    gap = " " * (len(number) - 2) + "| " + " " * (where.column - 1)
    marks = "^" * min(where.width, max(1, len(where.source_line) - where.column + 1))
    return Text(number, "blue").append(where.source_line, "default").append(f"\n{gap}", "blue").append(marks, "red")

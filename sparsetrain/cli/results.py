"""`sparsetrain eval`, `export` and `generate`: what a run has come to."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsetrain.cli.arguments import RunFolderPath


def evaluate(run: RunFolderPath) -> None:
    """Measure the held-out loss of a run's last checkpoint, on each phase's data."""
    from sparsetrain.training import evaluate_run

    for phase, result in evaluate_run(run).items():
        typer.echo(
            f"{phase}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte ({result.num_tokens} held-out tokens)"
        )


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

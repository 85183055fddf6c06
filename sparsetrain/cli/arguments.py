"""What several commands take, and how it is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsetrain.errors import ConfigError

if TYPE_CHECKING:
    from sparsetrain.config import RunConfig
    from sparsetrain.training.run_folder import OnExisting

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


def load_run(config: str, overrides: Sequence[str] | None, *, world_size: int | None = None) -> "RunConfig":
    """Read a YAML and the changes to it.

    Args:
        config: Path of the YAML.
        overrides: `key=value` each.
        world_size: Number of ranks, where it is known already.

    Raises:
        ConfigError: The YAML or a change to it is wrong.
    """
    from sparsetrain.config import load_config

    if "=" in config and not Path(config).exists():
        raise ConfigError(f"the YAML file comes first, then changes to it such as {config}")
    return load_config(config, overrides or (), world_size=world_size)


@contextmanager
def located(config: str, overrides: Sequence[str] | None) -> Iterator[None]:
    """Name the line of the YAML, or the change to it, that is to blame for what turns out wrong later on.

    Raises:
        InvalidConfig: As it was raised inside, with positions.
    """
    from sparsetrain.config import InvalidConfig, locate

    try:
        yield
    except InvalidConfig as error:
        raise locate(error, config, overrides or ()) from None


def on_existing_run(resume: bool, overwrite: bool) -> "OnExisting":
    """What to do about a run that the output folder holds.

    Raises:
        ConfigError: Both are asked for.
    """
    if resume and overwrite:
        raise ConfigError("--resume keeps what --overwrite deletes; give one of the two")
    return "resume" if resume else "overwrite" if overwrite else "refuse"

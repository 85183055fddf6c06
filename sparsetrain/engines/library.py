"""The outside libraries that engines stand on: whether one is installed, in a version that has been tested."""

from dataclasses import dataclass
from importlib import metadata

from sparsetrain.errors import ConfigError


@dataclass(frozen=True)
class EngineLibrary:
    """A library that is not imported before it is known to fit."""

    engine: str
    """What parallel.engine says when it is wanted."""
    name: str
    """For people."""
    package: str
    """For pip."""
    installation: str
    """The command that installs it, as an extra of this project."""
    lowest: tuple[int, int]
    """The oldest release that is tested."""
    beyond: tuple[int, int]
    """The first release after those that are tested."""

    def require(self) -> None:
        """Make sure that it can be imported, without doing so.

        Raises:
            ConfigError: It is not installed, or is of a version that has not been tested.
        """
        where, otherwise = f"parallel.engine = {self.engine}", "or set parallel.engine=torch"
        try:
            version = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{where}: {self.name} is not installed. {self.installation}, {otherwise}") from None
        release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if not self.lowest <= release < self.beyond:
            lowest, beyond = (".".join(map(str, bound)) for bound in (self.lowest, self.beyond))
            raise ConfigError(
                f"{where}: version {version} of {self.name} is installed, and {lowest} up to, not including, {beyond} "
                f"are tested. pip install '{self.package}>={lowest},<{beyond}', {otherwise}"
            )

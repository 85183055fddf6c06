"""Which sparsetrain and sparsetrain_kernels a process imports, and whether they belong together.

With `ray job submit --working-dir .` Ray puts the repository's `sparsetrain` in front of an installed one but finds no
`sparsetrain_kernels` there, so that the two come from different versions without a word. Hence this check.
"""

import hashlib
import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path

from sparsetrain.errors import ClusterError

_FIX = (
    "Submit with `sparsetrain submit`, or with `--runtime-env launch/runtime_env.yaml`, which ships both packages; "
    "`--working-dir .` ships only one."
)


@dataclass(frozen=True)
class Packages:
    """Where both packages are, and what is in them."""

    host: str
    library: Path
    kernels: Path
    digest: str
    """SHA-256 over the Python sources of both, so that equal versions on different machines are equal."""

    def __str__(self) -> str:
        sources = f"sources {self.digest[:12]}"
        return f"sparsetrain {self.library}, sparsetrain_kernels {self.kernels}, {sources}, on {self.host}"


def find_packages() -> Packages:
    """Locate both packages as this process imports them.

    Raises:
        ClusterError: One of them is missing, or they do not come from the same place.
    """
    library, kernels = (_root(name) for name in ("sparsetrain", "sparsetrain_kernels"))
    if not _same_origin(library, kernels):
        raise ClusterError(
            f"sparsetrain is imported from {library} and sparsetrain_kernels from {kernels}: two different "
            f"installations. {_FIX}"
        )
    return Packages(socket.gethostname(), library, kernels, _digest(library, kernels))


def check_same(here: Packages, driver: Packages) -> None:
    """Refuse to train with other sources than the driver's.

    The very same folders on the same machine pass unread: somebody may edit them during a run.

    Raises:
        ClusterError: The sources differ.
    """
    same_folders = (here.host, here.library, here.kernels) == (driver.host, driver.library, driver.kernels)
    if not same_folders and here.digest != driver.digest:
        raise ClusterError(
            f"a worker imports other sources than the driver.\n  worker: {here}\n  driver: {driver}\n{_FIX}"
        )


def _root(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ClusterError(f"the package {name} cannot be imported here. {_FIX}")
    return Path(spec.origin).resolve().parent


def _same_origin(library: Path, kernels: Path) -> bool:
    """True for one site-packages, for a source tree, and for two uploads of one Ray runtime environment."""
    both_uploaded = library.parents[1] == kernels.parents[1] and library.parents[1].name == "py_modules_files"
    return kernels.parent in (library.parent, library.parent / "kernels") or both_uploaded


def _digest(*roots: Path) -> str:
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

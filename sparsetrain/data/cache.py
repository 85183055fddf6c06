"""Folders that are built once, whole or not at all, however many processes ask for them at the same time."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsetrain.errors import DataError

FORMAT_VERSION = 1
"""Part of every cache key: raise it when what is stored, or how text becomes tokens, changes."""

Progress = Callable[[str, int, int | None], None]
"""Called as (stage, done_bytes, total_bytes or None where it cannot be known)."""


def no_progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    """Show nothing."""


def build_once(cache: Path, name: str, build: Callable[[Path], None], on_progress: Progress = no_progress) -> Path:
    """Return the folder `cache/name`, building it first if it is not there.

    The folder is built beside its final place and renamed when complete, so it is never seen half-made. Builders of
    the same folder wait for the first one through a lock on a file (flock: released by the system when a process dies;
    on NFS it needs version 4).

    Args:
        cache: Folder of the cache; made if need be.
        name: Name of the folder, with a hash in it of everything that its content depends on.
        build: Fills the empty folder that it is given.
        on_progress: Told when another process is building the folder and this one waits.

    Raises:
        DataError: The cache is not writable or its disk is full, or `build` cannot read a file elsewhere; whatever else
            `build` raises. Nothing is left behind.
    """
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{name}.lock", on_wait=lambda: on_progress(f"waiting for {name}", 0, None)):
            if not folder.is_dir():
                _build(folder, build)
    except OSError as error:
        if not _concerns(cache, error):
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        raise _cache_error(cache, error) from error
    return folder


def remember(path: Path, text: str) -> None:
    """Keep a small text that only saves time: written whole or not at all, and given up without an error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, path)


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.partial-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a builder that was killed: the lock is ours, so it is gone
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would lock other users out of a shared cache
        build(partial)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _concerns(cache: Path, error: OSError) -> bool:
    """Whether the cache may be to blame; an error without a name comes from a write to an open file, as a rule."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    path, cache = Path(error.filename).absolute(), cache.absolute()
    return path.is_relative_to(cache) or cache.is_relative_to(path)  # or a parent that could not be made


def _cache_error(cache: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"data.cache={cache}: the disk is full ({error.strerror}); free some space or point data.cache at another "
            "disk. Nothing half-made was left behind"
        )
    return DataError(f"data.cache={cache}: cannot be written ({error}); point data.cache at a folder that can")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

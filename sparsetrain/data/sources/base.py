"""The protocol of a source, and what the sources that read local files share."""

import glob
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Protocol

from sparsetrain.errors import DataError

_SETTLED_AFTER_S = 2.0  # file systems stamp times no finer than this; FAT is the coarsest


class Document(NamedTuple):
    """One document."""

    identity: str
    """What the held-out split goes by: a name that the document keeps, or its text."""
    text: str
    num_bytes: int
    """How much of `Source.total_bytes` it took up, for the progress display."""


class Source(Protocol):
    """A finite sequence of documents, the same ones in the same order every time."""

    @property
    def kind(self) -> str:
        """`data.source.kind`."""

    @property
    def label(self) -> str:
        """What people call it."""

    @property
    def version(self) -> str:
        """Version of the text, as far as it has one."""

    @property
    def options(self) -> str:
        """What the documents depend on besides the content: part, field, separator, ..."""

    @property
    def total_bytes(self) -> int | None:
        """Size of what is going to be read, or None where that is not known beforehand."""

    @property
    def notices(self) -> Sequence[str]:
        """What a person should know about the documents, once they have been read."""

    def documents(self) -> Iterator[Document]:
        """Read the documents; one that is only white space counts as none.

        Raises:
            DataError: Something cannot be read or decoded; the message names the file and the place.
        """

    def stamp(self) -> str | None:
        """A cheap hash that changes whenever the content may have changed; None where there is no such thing."""

    def content_hash(self, on_bytes: Callable[[int], None]) -> str:
        """SHA-256 of the content in hex; `on_bytes` is told how many bytes have been read since the last call."""


@dataclass(frozen=True)
class SourceFile:
    """A file, and what its documents' identity may be derived from."""

    path: Path
    name: str
    size: int
    mtime_ns: int


class FileSource(ABC):
    """What all sources made of local files do alike.

    Args:
        files: The files in the order in which they are read.
    """

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self.files = tuple(files)

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Read the documents."""

    @property
    def version(self) -> str:
        """Files have none."""
        return ""

    @property
    def notices(self) -> Sequence[str]:
        """Nothing to say."""
        return ()

    @property
    def total_bytes(self) -> int | None:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def stamp(self) -> str | None:
        """Hash of the files' names, sizes and modification times; None while one of them has just been written.

        Within the resolution of a file system's clock a file can change and keep all three, so files younger than
        that are not vouched for.
        """
        newest_s = max(file.mtime_ns for file in self.files) / 1e9
        if time.time() - newest_s < _SETTLED_AFTER_S:
            return None
        facts = [(str(file.path.absolute()), file.name, file.size, file.mtime_ns) for file in self.files]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def content_hash(self, on_bytes: Callable[[int], None]) -> str:
        """SHA-256 over each file's name and bytes."""
        total = hashlib.sha256()
        for file in self.files:
            digest = hashlib.sha256()
            with open_binary(file.path) as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
                    on_bytes(len(chunk))
            total.update(f"{file.name}\n{digest.hexdigest()}\n".encode())
        return total.hexdigest()


def find_files(patterns: Sequence[str], key: str) -> list[SourceFile]:
    """Files that some paths and globs name, each once, sorted within a glob; their `name` is empty.

    Args:
        patterns: Paths and globs, `**` included, relative to the current directory.
        key: Dotted key of the config that holds them, for messages.

    Raises:
        DataError: A path does not exist or is a folder; a glob matches no file.
    """
    found: dict[Path, SourceFile] = {}
    for pattern in patterns:
        for path in _expand(pattern, key):
            found.setdefault(path, describe_file(path))
    return list(found.values())


def describe_file(path: Path, name: str = "") -> SourceFile:
    """Look up a file's size and modification time.

    Raises:
        DataError: It is not there.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return SourceFile(path, name, stat.st_size, stat.st_mtime_ns)


def open_binary(path: Path) -> BufferedReader:
    """Open a file of the corpus for reading.

    Raises:
        DataError: It cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def decode_utf8(content: bytes, path: Path, offset: int, line: int | None = None) -> str:
    """Decode strictly.

    Args:
        content: Bytes of the file from `offset` on.
        path: The file, for messages.
        offset: Where in the file `content` begins.
        line: Line number, where the file has lines that matter.

    Raises:
        DataError: Naming the file and the offset of the first byte that is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = f"{path}:{line}" if line is not None else str(path)
        byte = content[error.start]
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{byte:02x}) is not valid UTF-8 ({error.reason}); "
            "convert the file, for example with iconv -t utf-8"
        ) from error


def _expand(pattern: str, key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(f"{key}: {pattern} is a folder; name its files, for example {path / '**' / '*.txt'}")
    if not glob.has_magic(pattern):
        raise DataError(f"{key}: {pattern} not found (looked in {Path.cwd()})")
    matches = sorted(Path(match) for match in glob.iglob(str(path), recursive=True))
    files = [match for match in matches if match.is_file()]
    if not files:
        raise DataError(f"{key}: {pattern} matches no file (looked in {Path.cwd()})")
    return files

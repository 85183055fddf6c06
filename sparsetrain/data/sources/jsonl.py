"""JSON lines, plain or gzipped: one object a line, its text under one key."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, cast

from sparsetrain.config.data import JsonLines
from sparsetrain.data.sources.base import Document, FileSource, SourceFile, decode_utf8, find_files, open_binary
from sparsetrain.errors import DataError


class JsonLinesSource(FileSource):
    """Files of JSON lines; a line is a document, and its identity is its text.

    Raises:
        DataError: A path or glob finds nothing.
    """

    kind = "jsonl"

    def __init__(self, config: JsonLines) -> None:
        super().__init__(find_files(config.paths, "data.source.paths"))
        self._field = config.field
        self.label = ", ".join(config.paths)
        self.options = f"field={config.field!r}"

    def documents(self) -> Iterator[Document]:
        """Read the lines."""
        for file in self.files:
            consumed = 0
            offset = 0
            for number, (line, position) in enumerate(_lines(file), start=1):
                text = self._text(line, file, number, offset)
                yield Document(text, text, position - consumed)
                consumed = position
                offset += len(line)

    def _text(self, line: bytes, file: SourceFile, number: int, offset: int) -> str:
        where = f"{file.path}:{number}"
        if not line.strip():
            raise DataError(f"{where}: empty line; every line must be a JSON object, so remove it")
        try:
            record = json.loads(decode_utf8(line, file.path, offset, number))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object and found {type(record).__name__}")
        if self._field not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{where}: data.source.field={self._field!r} is not among the line's keys: {keys}")
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(f"{where}: {self._field!r} must be text and is {type(text).__name__}")
        if b"\\u" in line:
            _check_encodable(text, where)
        return text


def _check_encodable(text: str, where: str) -> None:
    """JSON can spell half a surrogate pair, which is no character and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: \\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character; repair the line"
        ) from error


def _lines(file: SourceFile) -> Iterator[tuple[bytes, int]]:
    """Each line with the number of the file's own (compressed) bytes read so far."""
    with open_binary(file.path) as raw:
        if file.path.suffix != ".gz":
            for line in raw:
                yield line, raw.tell()
            return
        try:
            with gzip.open(cast(IO[bytes], raw)) as lines:
                for line in lines:
                    yield line, raw.tell()
        except EOFError as error:
            raise DataError(
                f"{file.path}: the gzip file was cut short (expected more than {file.size} bytes)"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file.path}: not a valid gzip file ({error})") from error

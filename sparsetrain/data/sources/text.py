"""Local text files, divided into documents."""

import mmap
from collections.abc import Iterator

from sparsetrain.config.data import TextFiles
from sparsetrain.data.sources.base import Document, FileSource, SourceFile, decode_utf8, find_files, open_binary
from sparsetrain.errors import DataError

_BOM = b"\xef\xbb\xbf"
_UTF8_MAX_BYTES = 4


class TextFilesSource(FileSource):
    """Text files in UTF-8.

    A file is one document, unless a separator divides it; without a separator a file larger than
    `max_document_bytes` is cut at blank lines into documents up to that size. A document's identity is its text.

    Raises:
        DataError: A path or glob finds nothing.
    """

    kind = "text"

    def __init__(self, config: TextFiles) -> None:
        super().__init__(find_files(config.paths, "data.source.paths"))
        self._separator = None if config.separator is None else config.separator.encode()
        self._limit = config.max_document_bytes
        self.label = ", ".join(config.paths)
        self.options = f"separator={config.separator!r} max_document_bytes={config.max_document_bytes}"

    def documents(self) -> Iterator[Document]:
        """Read the documents."""
        for file in self.files:
            seen = 0
            for start, stop, content in self._parts(file):
                text = decode_utf8(content, file.path, start)
                yield Document(text, text, stop - seen)
                seen = stop

    @property
    def notices(self) -> tuple[str, ...]:
        """Says once which files had no boundaries of their own."""
        large = [file for file in self.files if self._separator is None and file.size > self._limit]
        if not large:
            return ()
        names = ", ".join(str(file.path) for file in large[:3]) + (
            f" and {len(large) - 3} more" if len(large) > 3 else ""
        )
        return (
            f"{names}: larger than max_document_bytes={self._limit} and without a separator, so cut at blank lines "
            "into documents up to that size; set data.source.separator if the text marks where documents end",
        )

    def _parts(self, file: SourceFile) -> Iterator[tuple[int, int, bytes]]:
        """Start, stop and bytes of each document of a file, which may be larger than memory."""
        with open_binary(file.path) as stream:
            if file.size == 0:
                return
            try:
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"{file.path}: cannot be read ({error})") from error
            with content:
                first = len(_BOM) if content[: len(_BOM)] == _BOM else 0
                if self._separator is not None:
                    spans = _split_at(content, first, self._separator)
                else:
                    spans = _cut_at_blank_lines(content, first, self._limit)
                for start, stop in spans:
                    yield start, stop, content[start:stop]


def _split_at(content: mmap.mmap, start: int, separator: bytes) -> Iterator[tuple[int, int]]:
    while (end := content.find(separator, start)) >= 0:
        yield start, end
        start = end + len(separator)
    yield start, len(content)


def _cut_at_blank_lines(content: mmap.mmap, start: int, limit: int) -> Iterator[tuple[int, int]]:
    while len(content) - start > limit:
        end = _last_cut(content, start, start + limit)
        yield start, end
        start = end
    yield start, len(content)


def _last_cut(content: mmap.mmap, start: int, stop: int) -> int:
    """The best place to end a document that begins at `start` and must end by `stop`."""
    for boundary in (b"\n\n", b"\n\r\n", b"\n", b" "):
        if (found := content.rfind(boundary, start, stop)) >= 0:
            return found + len(boundary)
    end = stop  # one endless word: cut between two characters
    while end > max(start + 1, stop - _UTF8_MAX_BYTES) and content[end] & 0xC0 == 0x80:
        end -= 1
    return end

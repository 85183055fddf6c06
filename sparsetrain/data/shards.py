"""Token shards in Megatron's .bin/.idx format, memory-mapped.

`PREFIX.bin` is nothing but tokens. `PREFIX.idx`, little-endian throughout, says where documents begin:

    9 bytes   b"MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     code of the token dtype
    uint64    number of sequences, N
    uint64    number of entries in the document index, D + 1 for D documents
    int32     [N]    tokens in each sequence
    int64     [N]    byte offset of each sequence in the .bin
    int64     [D+1]  first sequence of each document, and N
    int8      [N]    optional: modes of a multimodal corpus, ignored here

Shards written here have one sequence a document and two small files more, which shards from elsewhere lack:
`PREFIX.sparsetrain.json` says which tokenizer and text they are made of, `PREFIX.sparsetrain.npy` has a
`DOCUMENT_DTYPE` record a document.
"""

import array
import json
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsetrain.errors import DataError

DOCUMENT_DTYPE = np.dtype([("hash", "<u8"), ("num_bytes", "<i8")])
"""What is kept of a document besides its tokens: the hash that the held-out split goes by, its size as UTF-8."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOAT_CODES = {6: "float64", 7: "float32"}
_MAX_SEQUENCE = 2**31 - 1


def shard_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype that Megatron itself would choose for a vocabulary of this size."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class ShardWriter:
    """Writes one shard, a document at a time; the index appears when the `with` block ends without an error.

    Args:
        prefix: Path without .bin/.idx; its folder exists.
        dtype: Token dtype, one of those that `TokenShard` reads.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._code = next(code for code, name in _TOKEN_DTYPES.items() if np.dtype(name) == dtype)
        self._lengths = array.array("i")

    def __enter__(self) -> Self:
        self._bin = open(_with_suffix(self._prefix, ".bin"), "wb", buffering=1 << 20)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._bin:
            if kind is None:
                self._bin.flush()
                os.fsync(self._bin.fileno())
        if kind is None:
            self._write_index()

    def add_document(self, tokens: NDArray[Any]) -> None:
        """Append one document.

        Args:
            tokens: [n] integers that the shard's dtype can hold.

        Raises:
            DataError: The document is longer than the format can say.
        """
        if tokens.size > _MAX_SEQUENCE:
            raise DataError(
                f"{self._prefix}: document {len(self._lengths)} has {tokens.size} tokens, and one can have at most "
                f"{_MAX_SEQUENCE}; divide it (data.source.separator)"
            )
        self._bin.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(tokens.size)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1] * np.int64(self._dtype.itemsize), out=pointers[1:])
        documents = np.arange(lengths.size + 1, dtype=np.int64)
        header = _HEADER.pack(_MAGIC, 1, self._code, lengths.size, documents.size)
        parts = (lengths.astype("<i4"), pointers.astype("<i8"), documents.astype("<i8"))
        write_durably(_with_suffix(self._prefix, ".idx"), header + b"".join(part.tobytes() for part in parts))


class TokenShard:
    """One memory-mapped .bin/.idx pair; opening it checks that the two files agree.

    Attributes:
        prefix: Path without .bin/.idx.
        tokens: [num_tokens] read-only memory map in the shard's own dtype.
        num_documents: Number of documents.
        info: What `PREFIX.sparsetrain.json` says, or None where there is none.

    Raises:
        DataError: A file is missing, cut short, of another format, or .bin and .idx disagree.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path = _with_suffix(self.prefix, ".bin")
        self.idx_path = _with_suffix(self.prefix, ".idx")
        index = _map(self.idx_path)
        self._dtype, num_sequences, num_entries = _read_header(self.idx_path, index)
        lengths, pointers, documents = _split_index(self.idx_path, index, num_sequences, num_entries)
        self._check_sequences(lengths, pointers)
        self._check_documents(documents, num_sequences)
        self.num_documents = num_entries - 1
        self._bounds = self._document_bounds(pointers, documents)
        self.tokens: NDArray[Any] = _map(self.bin_path).view(self._dtype)
        self.info = self._read_info()

    def document_offsets(self) -> NDArray[np.int64]:
        """First token of each document and, last, the number of tokens: int64 [num_documents + 1], a fresh array."""
        offsets = np.empty(self.num_documents + 1, dtype=np.int64)
        np.floor_divide(self._bounds, self._dtype.itemsize, out=offsets[:-1])
        offsets[-1] = self.tokens.size
        return offsets

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Documents that begin after token `start` and before token `stop`, as offsets from `start`.

        A binary search in the memory-mapped index: ranks of one machine share its pages, and nothing is copied.
        """
        size = self._dtype.itemsize
        first = bisect_right(self._bounds, start * size)
        last = bisect_left(self._bounds, stop * size, lo=first)
        return self._bounds[first:last] // size - start

    def document_records(self) -> NDArray[Any] | None:
        """The `DOCUMENT_DTYPE` records [num_documents], or None for a shard from elsewhere.

        Raises:
            DataError: The file does not have one record a document.
        """
        path = _with_suffix(self.prefix, ".sparsetrain.npy")
        if not path.exists():
            return None
        try:
            records: NDArray[Any] = np.load(path)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); delete it and the shard's folder to build anew"
            ) from error
        if records.dtype != DOCUMENT_DTYPE or records.shape != (self.num_documents,):
            raise DataError(
                f"{path}: expected {self.num_documents} document records, as {self.idx_path.name} says, and found "
                f"{records.dtype} {list(records.shape)}"
            )
        return records

    def _check_sequences(self, lengths: NDArray[np.int32], pointers: NDArray[np.int64]) -> None:
        """Sequences lie one after the other and fill the .bin to its last byte."""
        if not self.bin_path.is_file():
            raise DataError(f"{self.bin_path}: not found, though {self.idx_path.name} is there")
        size = self._dtype.itemsize
        expected = int(lengths.sum(dtype=np.int64)) * size
        found = self.bin_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{self.bin_path}: expected {expected} bytes ({expected // size} tokens of {size} bytes, as "
                f"{self.idx_path.name} says) and found {found}; the shard was cut short or the two files do not belong "
                "together"
            )
        ends = np.cumsum(lengths, dtype=np.int64) * size
        if lengths.size and (lengths.min() < 0 or pointers[0] != 0 or not np.array_equal(pointers[1:], ends[:-1])):
            raise DataError(f"{self.idx_path}: damaged: sequences do not follow one another in {self.bin_path.name}")

    def _check_documents(self, documents: NDArray[np.int64], num_sequences: int) -> None:
        if (
            not documents.size
            or documents[0] != 0
            or documents[-1] != num_sequences
            or bool((documents[1:] < documents[:-1]).any())
        ):
            raise DataError(
                f"{self.idx_path}: damaged: the document index must rise from 0 to the {num_sequences} sequences"
            )

    def _document_bounds(self, pointers: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Byte offset of each document: the mapped pointers themselves where each document is one sequence."""
        if self.num_documents == pointers.size and bool((documents[1:] - documents[:-1] == 1).all()):
            return pointers
        ends = np.append(pointers, self.bin_path.stat().st_size)
        return np.asarray(ends[documents[:-1]])

    def _read_info(self) -> Mapping[str, Any] | None:
        path = _with_suffix(self.prefix, ".sparsetrain.json")
        if not path.exists():
            return None
        try:
            info = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        if not isinstance(info, dict):
            raise DataError(f"{path}: expected a JSON object and found {type(info).__name__}")
        return info


def check_vocabulary(shard: TokenShard, tokens: NDArray[np.int64], start: int, vocab_size: int) -> None:
    """Make sure that tokens of a shard are in the vocabulary, before an embedding is asked for one that it lacks.

    Args:
        shard: Where they come from.
        tokens: [n] int64, not empty.
        start: Which token of the shard the first one is.
        vocab_size: Tokens must lie in [0, vocab_size).

    Raises:
        DataError: Naming the file, the place and the token.
    """
    unsigned = tokens.view(np.uint64)  # negative tokens become large ones: one pass finds both kinds
    if unsigned.max() >= vocab_size:
        at = int(np.argmax(unsigned >= vocab_size))
        raise DataError(
            f"{shard.bin_path}: token number {start + at} is {tokens[at]}, and data.tokenizer has the tokens 0 to "
            f"{vocab_size - 1}; the shard was made with another tokenizer"
        )


def write_sidecars(prefix: Path, info: Mapping[str, Any], records: NDArray[Any]) -> None:
    """Write what a shard of ours has besides .bin and .idx.

    Args:
        prefix: Path of the shard without .bin/.idx.
        info: JSON-able facts; `tokenizer` is checked when the shard is used.
        records: [num_documents] of `DOCUMENT_DTYPE`.
    """
    with open(_with_suffix(prefix, ".sparsetrain.npy"), "wb") as file:
        np.save(file, records)
        file.flush()
        os.fsync(file.fileno())
    write_durably(_with_suffix(prefix, ".sparsetrain.json"), json.dumps(info, indent=2).encode() + b"\n")


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _with_suffix(prefix: Path, suffix: str) -> Path:
    """`corpus.v2` + `.bin` -> `corpus.v2.bin`, which Path.with_suffix would not give."""
    return prefix.with_name(prefix.name + suffix)


def _map(path: Path) -> NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint8)
        # A plain array over the map: indexing np.memmap itself is several times slower.
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; a token shard is a pair PREFIX.bin and PREFIX.idx") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_header(path: Path, index: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    if index.size < _HEADER.size:
        raise DataError(
            f"{path}: expected a header of {_HEADER.size} bytes and found {index.size}; the file was cut short"
        )
    magic, version, code, num_sequences, num_entries = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1:
        raise DataError(
            f"{path}: not a Megatron index: expected {_MAGIC!r} version 1 and found {magic!r} version {version}"
        )
    if code in _FLOAT_CODES:
        raise DataError(f"{path}: dtype code {code} is {_FLOAT_CODES[code]}, and tokens are integers")
    if code not in _TOKEN_DTYPES:
        raise DataError(f"{path}: unknown dtype code {code}; expected one of {sorted(_TOKEN_DTYPES)}")
    return np.dtype(_TOKEN_DTYPES[code]), num_sequences, num_entries


def _split_index(
    path: Path, index: NDArray[np.uint8], num_sequences: int, num_entries: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    pointers_at = _HEADER.size + 4 * num_sequences
    documents_at = pointers_at + 8 * num_sequences
    expected = documents_at + 8 * num_entries
    if index.size not in (expected, expected + num_sequences):
        raise DataError(
            f"{path}: expected {expected} bytes ({num_sequences} sequences, {num_entries} document entries) and found "
            f"{index.size}; the file was cut short or overwritten"
        )
    lengths = index[_HEADER.size : pointers_at].view("<i4")
    pointers = index[pointers_at:documents_at].view("<i8")
    return lengths, pointers, index[documents_at:expected].view("<i8")

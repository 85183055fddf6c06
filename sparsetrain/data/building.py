"""From text to token shards, and from text to a trained tokenizer; both cached by the hash of what they depend on."""

import array
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparsetrain.data.cache import FORMAT_VERSION, Progress, build_once, remember
from sparsetrain.data.shards import DOCUMENT_DTYPE, ShardWriter, TokenShard, shard_dtype, write_durably, write_sidecars
from sparsetrain.data.sources import Document, Source
from sparsetrain.data.split import document_hash, held_out
from sparsetrain.data.tokenizer import Tokenizer, tokenizer_from_json, train_bpe
from sparsetrain.errors import DataError

_TEXT_AT_ONCE = 1 << 20  # characters handed to the tokenizer in one call
_SHOW_EVERY_BYTES = 1 << 18
_PREFIX = "tokens"


@dataclass
class _Meter:
    """Counts bytes towards a total and passes the count on now and then."""

    stage: str
    total: int | None
    on_progress: Progress
    done: int = field(default=0, init=False)
    shown: int = field(default=0, init=False)

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        news = self.done - self.shown  # none where a compressed file is all in the buffer: the rest costs no bytes
        if news >= _SHOW_EVERY_BYTES or (news and self.done == self.total):
            self.shown = self.done
            self.on_progress(self.stage, self.done, self.total)


def source_hash(source: Source, cache: Path, on_progress: Progress) -> str:
    """SHA-256 of a source's content.

    Reading all of a large corpus at every start would take minutes, so the hash is remembered under the `stamp` of
    the files (names, sizes, modification times in nanoseconds), as `make` and `git` do.
    """
    stamp = source.stamp()
    remembered = cache / "stamps" / stamp if stamp else None
    if remembered is not None and remembered.is_file():
        return remembered.read_text()
    meter = _Meter(f"reading {source.label}", source.total_bytes, on_progress)
    try:
        digest = source.content_hash(meter.add)
    except OSError as error:
        raise _unreadable(source, error) from error
    if remembered is not None:
        remember(remembered, digest)
    return digest


def build_shard(source: Source, tokenizer: Tokenizer, cache: Path, on_progress: Progress) -> TokenShard:
    """Open the token shard of a source, building it first where the cache has none.

    Raises:
        DataError: The text cannot be read or is empty, the cache cannot be written, or its disk is full.
    """
    content = source_hash(source, cache, on_progress)
    name = f"{source.kind}-{_key('shard', content, source.options, tokenizer.fingerprint)}"

    def build(folder: Path) -> None:
        _write_shard(folder / _PREFIX, source, content, tokenizer, on_progress)

    return TokenShard(build_once(cache, name, build, on_progress) / _PREFIX)


def build_bpe(
    sources: Iterable[Source], vocab_size: int, holdout: float, cache: Path, on_progress: Progress
) -> Tokenizer:
    """Open the BPE of the sources' training documents, training it first where the cache has none.

    Raises:
        DataError: As `build_shard`; or the text is too little for the vocabulary.
    """
    sources = list(sources)
    contents = [f"{source_hash(source, cache, on_progress)} {source.kind} {source.options}" for source in sources]
    name = f"bpe-{vocab_size}-{_key('bpe', str(vocab_size), repr(holdout), *contents)}"

    def build(folder: Path) -> None:
        totals = [source.total_bytes for source in sources]
        total = None if None in totals else 2 * sum(filter(None, totals))  # read once for the split, once to train
        meter = _Meter("training the tokenizer", total, on_progress)
        texts = (document.text for source in sources for document in _training_documents(source, holdout, meter))
        trained = train_bpe(texts, vocab_size)
        write_durably(folder / "tokenizer.json", json.dumps(trained.to_json()).encode())

    path = build_once(cache, name, build, on_progress) / "tokenizer.json"
    try:
        return tokenizer_from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {path.parent} to train it anew") from error


def _training_documents(source: Source, holdout: float, meter: _Meter) -> Iterator[Document]:
    """The documents that the split leaves for training; it needs all hashes first, so the source is read twice."""
    identities = (document.identity for document in _documents(source, meter))
    hashes = np.fromiter(map(document_hash, identities), dtype=np.uint64)
    if hashes.size == 0:
        raise _empty(source)
    for document, is_held_out in zip(_documents(source, meter), held_out(hashes, holdout), strict=True):
        if not is_held_out:
            yield document


def _documents(source: Source, meter: _Meter) -> Iterator[Document]:
    """The documents of a source that say something."""
    for document in _read(source):
        meter.add(document.num_bytes)
        if document.text.strip():
            yield document


def _read(source: Source) -> Iterator[Document]:
    """The documents of a source; a disk or network that fails meanwhile is the source's error, not the cache's."""
    try:
        yield from source.documents()
    except OSError as error:
        raise _unreadable(source, error) from error


def _write_shard(prefix: Path, source: Source, content: str, tokenizer: Tokenizer, on_progress: Progress) -> None:
    meter = _Meter(f"tokenizing {source.label}", source.total_bytes, on_progress)
    hashes, sizes = array.array("Q"), array.array("q")
    num_tokens = 0
    with ShardWriter(prefix, shard_dtype(tokenizer.vocab_size)) as writer:
        for group in _groups(_documents(source, meter)):
            for document, ids in zip(group, tokenizer.encode_batch([document.text for document in group]), strict=True):
                writer.add_document(np.append(ids, tokenizer.end_of_document))
                hashes.append(document_hash(document.identity))
                sizes.append(len(document.text.encode()))
                num_tokens += ids.size + 1
    if not hashes:
        raise _empty(source)
    records = np.empty(len(hashes), dtype=DOCUMENT_DTYPE)
    records["hash"], records["num_bytes"] = hashes, sizes
    info = {
        "format": FORMAT_VERSION,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "source": {"kind": source.kind, "version": source.version, "sha256": content},
        "documents": len(hashes),
        "bytes": int(records["num_bytes"].sum()),
        "tokens": num_tokens,
    }
    write_sidecars(prefix, info, records)


def _unreadable(source: Source, error: OSError) -> DataError:
    return DataError(
        f"data.source {source.label}: cannot be read ({error}); check that its files are still there and their disk is "
        "sound"
    )


def _empty(source: Source) -> DataError:
    return DataError(f"data.source {source.label}: is empty; there is no text in it")


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents that are worth one call of the tokenizer."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= _TEXT_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _key(*parts: str) -> str:
    """64 bits in hex of a list of texts and the format version."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()[:16]

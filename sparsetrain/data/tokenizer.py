"""Text to token ids and back: bytes, or a byte-pair encoding of the `tokenizers` library."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sparsetrain.errors import DataError

Tokens = NDArray[np.int64]

_END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (_END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends each document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text becomes."""

    @property
    def token_bytes(self) -> NDArray[np.int64] | None:
        """UTF-8 bytes of each token, int64 [vocab_size], or None where a token's bytes depend on its neighbours."""

    def encode(self, text: str) -> Tokens:
        """Ids of a text, int64 [n], without end-of-document."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text, on all cores where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; end-of-document is left out, bytes that are no UTF-8 become U+FFFD."""

    def to_json(self) -> dict[str, Any]:
        """All that `tokenizer_from_json` needs to make the same tokenizer again."""


class ByteTokenizer:
    """A token for each of the 256 bytes of UTF-8, and 256 for end-of-document."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    fingerprint = hashlib.sha256(b"bytes, end of document 256").hexdigest()

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """One for every byte, none for end-of-document."""
        return np.append(np.ones(256, dtype=np.int64), 0)

    def encode(self, text: str) -> Tokens:
        """Ids of a text, int64 [n], without end-of-document."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; end-of-document is left out, bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        """All that `tokenizer_from_json` needs."""
        return {"kind": "bytes"}


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    Texts are encoded as they are: no truncation, no padding, no tokens around them, and a special token that is
    spelled out in a text is ordinary text, so that no document can forge the end of one.

    Args:
        inner: The tokenizer; it is configured as just said.
        end_of_document: Token that ends a document; default the first of `<|endoftext|>`, `<|end_of_text|>`, `</s>`
            and `<eos>` that the vocabulary has.
        name: What people call it; messages use it.

    Raises:
        DataError: The vocabulary has no such token.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_of_document: str | None, name: str) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self.name = name
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._end_text = _choose_end(vocab, end_of_document, name)
        self.end_of_document = vocab[self._end_text]
        self._json = json.loads(inner.to_str())
        canonical = json.dumps([self._json, self.end_of_document], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def token_bytes(self) -> NDArray[np.int64] | None:
        """Exact for byte-level tokenizers, whose tokens are byte strings; None for all others."""
        if not _is_byte_level(self._json):
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for text, token in self._inner.get_vocab(with_added_tokens=False).items():
            sizes[token] = len(text)  # byte-level vocabularies spell each byte as one character
        for added in self._json["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes

    def encode(self, text: str) -> Tokens:
        """Ids of a text, int64 [n], without end-of-document."""
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return str(self._inner.decode([int(token) for token in ids], skip_special_tokens=True))

    def to_json(self) -> dict[str, Any]:
        """All that `tokenizer_from_json` needs; `tokenizer` is a tokenizer.json that other libraries read."""
        return {"kind": "subword", "name": self.name, "end_of_document": self._end_text, "tokenizer": self._json}


def train_bpe(texts: Iterator[str], vocab_size: int) -> SubwordTokenizer:
    """Train a byte-level BPE: every text can be encoded, and the same texts always give the same tokenizer.

    Args:
        texts: Documents to train on.
        vocab_size: Tokens in all: 256 bytes, `<|endoftext|>` and the merges.

    Raises:
        DataError: The texts are too few or too short for so many merges.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[_END_OF_DOCUMENT],
        show_progress=False,
    )

    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() < vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size}: the training documents are too little text for it; they give "
            f"{inner.get_vocab_size()} tokens. Lower vocab_size to that, or add text"
        )
    return SubwordTokenizer(inner, _END_OF_DOCUMENT, name="bpe")


def read_tokenizer_file(path: str, end_of_document: str | None) -> SubwordTokenizer:
    """Open a tokenizer.json.

    Raises:
        DataError: The file is missing, is not a tokenizer.json, or has no token that ends a document.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.tokenizer.path={path}: cannot be read ({error})") from error
    return SubwordTokenizer(_parse(text, f"data.tokenizer.path={path}"), end_of_document, name=path)


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Make the tokenizer that `Tokenizer.to_json` described.

    Raises:
        DataError: It is not such a description.
    """
    match value:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "subword", "name": str(name), "end_of_document": str(end), "tokenizer": dict(inner)}:
            return SubwordTokenizer(_parse(json.dumps(inner), name), end, name)
        case _:
            found = f"the keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
            raise DataError(f"expected a saved tokenizer and found {found}")


def _parse(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{where}: not a tokenizer.json of the tokenizers library ({error})") from error


def _choose_end(vocab: dict[str, int], wanted: str | None, name: str) -> str:
    candidates = (wanted,) if wanted is not None else _KNOWN_ENDS
    for candidate in candidates:
        if candidate in vocab:
            return candidate
    if wanted is None:
        raise DataError(
            f"data.tokenizer {name}: has none of {', '.join(_KNOWN_ENDS)}; name the token that ends a document in "
            "data.tokenizer.end_of_document"
        )
    near = difflib.get_close_matches(wanted, vocab, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"data.tokenizer.end_of_document={wanted!r} is no token of {name}{hint}")


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether text is cut up as bytes from the first to the last, losing and adding none."""
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    known = all(step.get("type") in ("ByteLevel", "Split", "Digits") for step in steps)
    changes_text = tokenizer.get("normalizer") is not None or any(
        step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps
    )
    return known and not changes_text and any(step.get("type") == "ByteLevel" for step in steps)

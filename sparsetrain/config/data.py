"""`data`: where text comes from, how it becomes tokens, and how long a sample is."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sparsetrain.config.base import Real, Section, kind_from_text, one_or_many
from sparsetrain.config.units import Count


class _Source(Section):
    weight: Real = Field(default=1.0, gt=0)
    """Share of the tokens drawn from this source in a mixture, relative to the other weights."""


class PythonStdlib(_Source):
    """Source files of the running interpreter's standard library, without its tests and idlelib."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    part: Literal["code", "prose"] = "code"
    """code: whole source files. prose: the docstrings in them, one document a file."""


class TextFiles(_Source):
    """Local text files; a file is a document unless a separator divides it."""

    kind: Literal["text"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs (`**` included), relative to the current directory."""
    separator: str | None = Field(default=None, min_length=1)
    """Text between documents in one file; without it, files larger than `max_document_bytes` are cut at blank lines."""
    max_document_bytes: Count = Field(default=64 * 1024, gt=0)


class JsonLines(_Source):
    """One JSON object a line, plain or gzipped (.gz)."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...] = Field(min_length=1)
    field: str = "text"
    """Key that holds the text of a document."""


class HuggingFace(_Source):
    """A dataset of the `datasets` library (extra: hf), from a hub name or a local folder."""

    kind: Literal["huggingface"]
    name: str
    subset: str | None = None
    split: str = "train"
    field: str = "text"


class MegatronShards(_Source):
    """Token shards in Megatron's .bin/.idx format, made with the same tokenizer."""

    kind: Literal["megatron"]
    prefixes: tuple[str, ...] = Field(min_length=1)
    """Paths without .bin/.idx."""


Source = Annotated[
    Annotated[PythonStdlib | TextFiles | JsonLines | HuggingFace | MegatronShards, Field(discriminator="kind")],
    BeforeValidator(kind_from_text),
]


class ByteTokenizer(Section):
    """One token a byte, plus end-of-document."""

    kind: Literal["bytes"] = "bytes"


class BpeTokenizer(Section):
    """Byte-level BPE trained on the corpus' training documents."""

    kind: Literal["bpe"]
    vocab_size: Count = Field(default=4096, ge=258)


class TokenizerFile(Section):
    """A tokenizer.json of the `tokenizers` library."""

    kind: Literal["file"]
    path: str
    end_of_document: str | None = None
    """Token that ends a document; default the first of `<|endoftext|>`, `<|end_of_text|>`, `</s>` and `<eos>` that the
    file has."""


def tokenizer_from_text(value: Any) -> Any:
    """Let `bytes` stand for `{kind: bytes}` and `my.json` for `{kind: file, path: my.json}`."""
    if isinstance(value, str) and value.endswith(".json"):
        return {"kind": "file", "path": value}
    return kind_from_text(value)


Tokenizer = Annotated[
    Annotated[ByteTokenizer | BpeTokenizer | TokenizerFile, Field(discriminator="kind")],
    BeforeValidator(tokenizer_from_text),
]


class DataConfig(Section):
    """A mixture of sources, tokenized and packed into samples of `seq_len` tokens."""

    source: Annotated[tuple[Source, ...], BeforeValidator(one_or_many), Field(min_length=1)] = (PythonStdlib(),)
    """One source or a list of them, mixed by their weights."""
    tokenizer: Tokenizer = ByteTokenizer()
    seq_len: Count = Field(default=256, gt=1)
    """Tokens a sample."""
    holdout: Real = Field(default=0.01, ge=0.0, lt=1.0)
    """Share of the documents kept for evaluation; which ones depends on the document alone."""
    cache: str = ".cache/sparsetrain/data"
    """Folder for token shards, named by content hash."""

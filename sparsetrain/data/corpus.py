"""One source as tokens: built from text, or token shards from elsewhere, checked against the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config import data as schema
from sparsetrain.data.building import build_shard
from sparsetrain.data.cache import Progress
from sparsetrain.data.order import mix
from sparsetrain.data.shards import TokenShard, check_vocabulary
from sparsetrain.data.sources import Source
from sparsetrain.data.split import document_hash, held_out
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.errors import DataError

_PROBES = 64  # places at which a shard from elsewhere is looked at before training starts
_PROBE_TOKENS = 16 * 1024
_PROBE_DOCUMENTS = 1000


@dataclass(frozen=True)
class Corpus:
    """A source as tokens, its documents divided into training and held-out ones."""

    kind: str
    label: str
    version: str
    sha256: str | None
    """Of the text; None for token shards from elsewhere, because reading terabytes to hash them is no use."""
    weight: float
    shards: Sequence[TokenShard]
    held_out: Sequence[NDArray[np.bool_]]
    """For each shard, bool [num_documents]: which of its documents are held out."""
    notices: Sequence[str]

    @property
    def training(self) -> list[NDArray[np.bool_]]:
        """The other side of `held_out`."""
        return [~mask for mask in self.held_out]

    def facts(self) -> dict[str, Any]:
        """What the run folder says about the source."""
        infos = [shard.info for shard in self.shards]
        return {
            "kind": self.kind,
            "label": self.label,
            "version": self.version,
            "sha256": self.sha256,
            "weight": self.weight,
            "documents": sum(shard.num_documents for shard in self.shards),
            "held_out_documents": int(sum(mask.sum() for mask in self.held_out)),
            "bytes": sum(info["bytes"] for info in infos if info) if all(infos) else None,
        }


def corpus_from_text(
    source: Source, weight: float, tokenizer: Tokenizer, holdout: float, cache: Path, on_progress: Progress
) -> Corpus:
    """Tokenize a text source, or open its shard in the cache.

    Raises:
        DataError: As `build_shard`; or the shard in the cache is damaged.
    """
    shard = build_shard(source, tokenizer, cache, on_progress)
    check_tokenizer(shard, tokenizer)
    records = shard.document_records()
    if records is None or shard.info is None:
        raise DataError(
            f"{shard.prefix}: its .sparsetrain.json or .sparsetrain.npy is gone; delete {shard.prefix.parent} to build "
            "the shard anew"
        )
    return Corpus(
        kind=source.kind,
        label=source.label,
        version=source.version,
        sha256=shard.info["source"]["sha256"],
        weight=weight,
        shards=[shard],
        held_out=[held_out(records["hash"], holdout)],
        notices=source.notices,
    )


def corpus_from_shards(config: schema.MegatronShards, tokenizer: Tokenizer, holdout: float) -> Corpus:
    """Open token shards where they are.

    Raises:
        DataError: A shard is missing, damaged or was made with another tokenizer.
    """
    shards = [TokenShard(Path(prefix).expanduser()) for prefix in config.prefixes]
    notices = []
    for shard in shards:
        check_tokenizer(shard, tokenizer)
        _probe_vocabulary(shard, tokenizer.vocab_size)
        if not _ends_documents(shard, tokenizer.end_of_document):
            notices.append(
                f"{shard.prefix}: its documents do not end with the tokenizer's end-of-document token "
                f"{tokenizer.end_of_document}, so the model will not learn where documents end"
            )
    hashes = np.concatenate([_document_hashes(shard) for shard in shards])
    ends = np.cumsum([shard.num_documents for shard in shards])
    return Corpus(
        kind=config.kind,
        label=", ".join(config.prefixes),
        version="",
        sha256=None,
        weight=config.weight,
        shards=shards,
        held_out=np.split(held_out(hashes, holdout), ends[:-1]),
        notices=notices,
    )


def check_tokenizer(shard: TokenShard, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer with the one that a shard says it was made with; shards from elsewhere do not say.

    Raises:
        DataError: They differ; both are named.
    """
    if shard.info is None:
        return
    made_with = shard.info.get("tokenizer")
    if not isinstance(made_with, dict) or not {"name", "fingerprint"} <= made_with.keys():
        raise DataError(
            f"{shard.prefix}.sparsetrain.json: does not say which tokenizer the shard was made with; build it anew"
        )
    if made_with["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"{shard.prefix}: made with the tokenizer {made_with['name']} ({made_with['fingerprint'][:8]}), and "
            f"data.tokenizer is {tokenizer.name} ({tokenizer.fingerprint[:8]}); use the first, or build the shard anew"
        )


def _document_hashes(shard: TokenShard) -> NDArray[np.uint64]:
    """What the split goes by: kept beside shards of ours; else of the shard's name and the document's number."""
    records = shard.document_records()
    if records is not None:
        return np.asarray(records["hash"])
    return mix(np.arange(shard.num_documents, dtype=np.uint64) ^ np.uint64(document_hash(shard.prefix.name)))


def _probe_vocabulary(shard: TokenShard, vocab_size: int) -> None:
    """Look for foreign tokens at evenly spaced places; all others are looked at when they are read."""
    last = max(0, shard.tokens.size - _PROBE_TOKENS)
    for start in np.unique(np.linspace(0, last, _PROBES, dtype=np.int64)):
        tokens = shard.tokens[start : start + _PROBE_TOKENS].astype(np.int64)
        if tokens.size:
            check_vocabulary(shard, tokens, int(start), vocab_size)


def _ends_documents(shard: TokenShard, end_of_document: int) -> bool:
    ends = shard.document_offsets()[1 : _PROBE_DOCUMENTS + 1]
    return bool((shard.tokens[ends[ends > 0] - 1] == end_of_document).all())

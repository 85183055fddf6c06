"""`prepare`: from the `data` section of a config to a `Dataset`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config import data as schema
from sparsetrain.data.building import build_bpe, build_shard
from sparsetrain.data.cache import Progress, no_progress
from sparsetrain.data.dataset import Dataset, SourceStreams
from sparsetrain.data.order import mix
from sparsetrain.data.shards import TokenShard, check_vocabulary
from sparsetrain.data.sources import Source, open_source
from sparsetrain.data.split import document_hash, held_out
from sparsetrain.data.stream import TokenStream
from sparsetrain.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer_file
from sparsetrain.errors import DataError

_PROBES = 64  # places at which a shard from elsewhere is looked at before training starts
_PROBE_TOKENS = 16 * 1024
_PROBE_DOCUMENTS = 1000


def prepare(
    config: schema.DataConfig,
    *,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    on_progress: Progress | None = None,
) -> Dataset:
    """Open the corpus that a config describes, tokenizing it first if the cache does not have it.

    Processes that prepare the same corpus at the same time build it once. Later phases of a run pass the first one's
    tokenizer: a BPE is trained on the text of the first phase, and the model's embedding belongs to it.

    Args:
        config: The `data` section.
        seed: Seed of the run; decides the order of the samples and nothing else.
        tokenizer: Use this one; `config.tokenizer` must describe the same.
        on_progress: Called as (stage, done_bytes, total_bytes or None) while text is read or tokenized.

    Raises:
        DataError: Text is missing, empty, undecodable or too little for one sample; nothing can be held out; a token
            shard is damaged or was made with another tokenizer; the cache cannot be written or its disk is full.
    """
    progress = on_progress or no_progress
    cache = Path(config.cache).expanduser()
    texts = {
        number: open_source(source)
        for number, source in enumerate(config.source)
        if not isinstance(source, schema.MegatronShards)
    }
    tokenizer = _choose_tokenizer(config, tokenizer, list(texts.values()), cache, progress)
    corpora = []
    for number, source in enumerate(config.source):
        if isinstance(source, schema.MegatronShards):
            corpora.append(_open_megatron(source, tokenizer))
        else:
            shard = build_shard(texts[number], tokenizer, cache, progress)
            _check_tokenizer(shard, tokenizer)
            corpora.append(_from_text(texts[number], source.weight, shard))
    for corpus in corpora:
        corpus.held_out = _split(corpus.hashes, [shard.num_documents for shard in corpus.shards], config.holdout)
    return _assemble(config, seed, tokenizer, corpora)


@dataclass
class _Corpus:
    """A source as tokens, before it is divided into samples."""

    kind: str
    label: str
    version: str
    sha256: str | None
    weight: float
    shards: Sequence[TokenShard]
    hashes: NDArray[np.uint64]
    notices: Sequence[str]
    held_out: list[NDArray[np.bool_]] = field(default_factory=list)
    """For each shard, bool [num_documents]."""


def _choose_tokenizer(
    config: schema.DataConfig, given: Tokenizer | None, sources: Sequence[Source], cache: Path, progress: Progress
) -> Tokenizer:
    match config.tokenizer:
        case schema.BpeTokenizer(vocab_size=vocab_size) if given is not None:
            if given.name != "bpe" or given.vocab_size != vocab_size:
                raise _other_tokenizer(given, f"bpe with {vocab_size} tokens")
            return given
        case schema.BpeTokenizer(vocab_size=vocab_size):
            if not sources:
                raise DataError(
                    "data.tokenizer.kind=bpe is trained on text, and data.source has token shards only; give the "
                    "tokenizer.json that they were made with"
                )
            wanted = build_bpe(sources, vocab_size, config.holdout, cache, progress)
        case schema.ByteTokenizer():
            wanted = ByteTokenizer()
        case schema.TokenizerFile(path=path, end_of_document=end):
            wanted = read_tokenizer_file(path, end)
    if given is not None and given.fingerprint != wanted.fingerprint:
        raise _other_tokenizer(given, f"{wanted.name} ({wanted.fingerprint[:8]})")
    return wanted


def _other_tokenizer(given: Tokenizer, wanted: str) -> DataError:
    return DataError(
        f"data.tokenizer is {wanted}, and the run's is {given.name} with {given.vocab_size} tokens "
        f"({given.fingerprint[:8]}); all phases of a run share one tokenizer"
    )


def _from_text(source: Source, weight: float, shard: TokenShard) -> _Corpus:
    records = shard.document_records()
    if records is None or shard.info is None:
        raise DataError(
            f"{shard.prefix}: its .sparsetrain.json or .sparsetrain.npy is gone; delete {shard.prefix.parent} to build "
            "the shard anew"
        )
    sha256 = shard.info["source"]["sha256"]
    return _Corpus(source.kind, source.label, source.version, sha256, weight, [shard], records["hash"], source.notices)


def _open_megatron(config: schema.MegatronShards, tokenizer: Tokenizer) -> _Corpus:
    shards = [TokenShard(Path(prefix).expanduser()) for prefix in config.prefixes]
    notices = []
    for shard in shards:
        _check_tokenizer(shard, tokenizer)
        _probe_vocabulary(shard, tokenizer.vocab_size)
        if not _ends_documents(shard, tokenizer.end_of_document):
            notices.append(
                f"{shard.prefix}: its documents do not end with the tokenizer's end-of-document token "
                f"{tokenizer.end_of_document}, so the model will not learn where documents end"
            )
    hashes = np.concatenate([_document_hashes(shard) for shard in shards])
    label = ", ".join(config.prefixes)
    return _Corpus("megatron", label, "", None, config.weight, shards, hashes, notices)


def _document_hashes(shard: TokenShard) -> NDArray[np.uint64]:
    """What the split goes by: kept beside shards of ours; else of the shard's name and the document's number."""
    records = shard.document_records()
    if records is not None:
        return np.asarray(records["hash"])
    return mix(np.arange(shard.num_documents, dtype=np.uint64) ^ np.uint64(document_hash(shard.prefix.name)))


def _check_tokenizer(shard: TokenShard, tokenizer: Tokenizer) -> None:
    """Shards of ours say what they were made with."""
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


def _split(hashes: NDArray[np.uint64], sizes: Sequence[int], share: float) -> list[NDArray[np.bool_]]:
    return np.split(held_out(hashes, share), np.cumsum(sizes)[:-1])


def _assemble(config: schema.DataConfig, seed: int, tokenizer: Tokenizer, corpora: Sequence[_Corpus]) -> Dataset:
    sources = []
    for corpus in corpora:
        kept = [~mask for mask in corpus.held_out]
        train = TokenStream(corpus.shards, kept, config.seq_len, tokenizer.vocab_size)
        if train.num_samples == 0:
            raise DataError(
                f"data.source {corpus.label}: {train.num_tokens} training tokens are fewer than one sample of "
                f"data.seq_len={config.seq_len} and its last target; add text or lower seq_len"
            )
        held = TokenStream(corpus.shards, corpus.held_out, config.seq_len, tokenizer.vocab_size)
        sources.append(SourceStreams(corpus.label, corpus.weight, train, held))
    if config.holdout > 0 and not any(source.held_out.num_tokens > 1 for source in sources):
        raise DataError(
            f"data.holdout={config.holdout}: nothing can be held out, because {corpora[0].label} is a single document; "
            "set data.source.separator where documents end, add files, or set data.holdout=0"
        )
    return Dataset(
        sources,
        tokenizer,
        seq_len=config.seq_len,
        seed=seed,
        bytes_per_token=_mean_bytes(tokenizer, corpora),
        provenance=_provenance(config, tokenizer, corpora, sources),
        notices=[notice for corpus in corpora for notice in corpus.notices],
    )


def _mean_bytes(tokenizer: Tokenizer, corpora: Sequence[_Corpus]) -> float | None:
    """Bytes of UTF-8 for each held-out token (any token where none is held out), if tokens alone do not tell."""
    if tokenizer.token_bytes is not None:
        return None
    pairs = [pair for corpus in corpora for pair in zip(corpus.shards, corpus.held_out, strict=True)]
    if not any(mask.any() for _, mask in pairs):
        pairs = [(shard, ~mask) for shard, mask in pairs]
    num_bytes = num_tokens = 0
    for shard, mask in pairs:
        offsets = shard.document_offsets()
        records = shard.document_records()
        num_tokens += int(np.diff(offsets)[mask].sum())
        if records is not None:
            num_bytes += int(records["num_bytes"][mask].sum())
        else:
            spans = zip(offsets[:-1][mask], offsets[1:][mask], strict=True)
            num_bytes += sum(len(tokenizer.decode(shard.tokens[start:stop]).encode()) for start, stop in spans)
    return num_bytes / max(1, num_tokens)


def _provenance(
    config: schema.DataConfig, tokenizer: Tokenizer, corpora: Sequence[_Corpus], sources: Sequence[SourceStreams]
) -> dict[str, Any]:
    return {
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "fingerprint": tokenizer.fingerprint,
        },
        "seq_len": config.seq_len,
        "holdout": config.holdout,
        "sources": [_source_facts(corpus, streams) for corpus, streams in zip(corpora, sources, strict=True)],
    }


def _source_facts(corpus: _Corpus, streams: SourceStreams) -> dict[str, Any]:
    infos = [shard.info for shard in corpus.shards]
    return {
        "kind": corpus.kind,
        "label": corpus.label,
        "version": corpus.version,
        "sha256": corpus.sha256,  # None for token shards from elsewhere: reading terabytes to hash them is no use
        "weight": corpus.weight,
        "documents": sum(shard.num_documents for shard in corpus.shards),
        "bytes": sum(info["bytes"] for info in infos if info) if all(infos) else None,
        "train_tokens": streams.train.num_tokens,
        "held_out_documents": int(sum(mask.sum() for mask in corpus.held_out)),
        "held_out_tokens": streams.held_out.num_tokens,
    }

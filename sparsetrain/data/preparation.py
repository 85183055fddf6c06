"""`prepare`: from the `data` section of a config to a `Dataset`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsetrain.config import data as schema
from sparsetrain.data.building import build_bpe
from sparsetrain.data.cache import Progress, no_progress
from sparsetrain.data.corpus import Corpus, corpus_from_shards, corpus_from_text
from sparsetrain.data.dataset import Dataset, SourceStreams
from sparsetrain.data.sources import Source, open_source
from sparsetrain.data.stream import TokenStream
from sparsetrain.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer_file
from sparsetrain.errors import DataError


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
    opened = [source if isinstance(source, schema.MegatronShards) else open_source(source) for source in config.source]
    texts = [source for source in opened if not isinstance(source, schema.MegatronShards)]
    tokenizer = _choose_tokenizer(config, tokenizer, texts, cache, progress)
    corpora = [
        corpus_from_shards(source, tokenizer, config.holdout)
        if isinstance(source, schema.MegatronShards)
        else corpus_from_text(source, section.weight, tokenizer, config.holdout, cache, progress)
        for source, section in zip(opened, config.source, strict=True)
    ]
    sources = [_into_samples(corpus, config.seq_len, tokenizer) for corpus in corpora]
    if config.holdout > 0 and not any(source.held_out.num_tokens > 1 for source in sources):
        raise DataError(
            f"data.holdout={config.holdout}: nothing can be held out, because {corpora[0].label} is a single document "
            "or copies of one; set data.source.separator to what ends a document, add files, or set data.holdout=0"
        )
    return Dataset(
        sources,
        tokenizer,
        seq_len=config.seq_len,
        seed=seed,
        bytes_per_token=_mean_bytes(tokenizer, corpora),
        provenance={
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
                "fingerprint": tokenizer.fingerprint,
            },
            "seq_len": config.seq_len,
            "holdout": config.holdout,
            "sources": [
                {**corpus.facts(), "train_tokens": s.train.num_tokens, "held_out_tokens": s.held_out.num_tokens}
                for corpus, s in zip(corpora, sources, strict=True)
            ],
        },
        notices=[notice for corpus in corpora for notice in corpus.notices],
    )


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


def _into_samples(corpus: Corpus, seq_len: int, tokenizer: Tokenizer) -> SourceStreams:
    train = TokenStream(corpus.shards, corpus.training, seq_len, tokenizer.vocab_size)
    if train.num_samples == 0:
        raise DataError(
            f"data.source {corpus.label}: {train.num_tokens} training tokens are fewer than one sample of "
            f"data.seq_len={seq_len} and its last target; add text or lower seq_len"
        )
    held_out = TokenStream(corpus.shards, corpus.held_out, seq_len, tokenizer.vocab_size)
    return SourceStreams(corpus.label, corpus.weight, train, held_out)


def _mean_bytes(tokenizer: Tokenizer, corpora: Sequence[Corpus]) -> float | None:
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

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from sparsetrain.config.data import DataConfig
from sparsetrain.data import NOT_COUNTED, Dataset, describe, prepare, tokenizer_from_json
from sparsetrain.data.split import document_hash, held_out
from sparsetrain.errors import DataError

Prepared = Callable[..., Dataset]
MakeTexts = Callable[..., list[str]]
WriteJsonl = Callable[..., Path]


def split(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """Texts to train on and held-out ones, in their order."""
    mask = held_out(np.array([document_hash(text) for text in texts], dtype=np.uint64), share)
    train = [text for text, is_held_out in zip(texts, mask, strict=True) if not is_held_out]
    return train, [text for text, is_held_out in zip(texts, mask, strict=True) if is_held_out]


def eval_ids(dataset: Dataset, batch_size: int, max_tokens: int, world_size: int = 1) -> list[list[int]]:
    """Sample ids that each rank reads, padding left out."""
    ranks = []
    for rank in range(world_size):
        batches = dataset.eval_batches(batch_size, max_tokens, rank=rank, world_size=world_size)
        ranks.append([i for batch in batches for i in batch.sample_ids.tolist() if i >= 0])
    return ranks


def in_order(dataset: Dataset) -> str:
    """All samples that are trained on, laid end to end in the order of the corpus."""
    batch = dataset.batch(0, dataset.num_train_samples)
    return dataset.tokenizer.decode(batch.tokens[batch.sample_ids.argsort()].flatten().tolist())


def test_batch_is_the_text_with_the_next_token_as_target(prepared: Prepared, make_texts: MakeTexts) -> None:
    dataset = prepared(make_texts(80))
    batch = dataset.batch(5, 3)

    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (3, 16)
    assert batch.tokens.dtype == batch.targets.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    after_an_end = torch.nn.functional.pad(batch.tokens[:, :-1] == dataset.tokenizer.end_of_document, (1, 0))
    assert torch.equal(batch.document_ids, after_an_end.cumsum(1).to(torch.int32))
    assert batch.to("cpu").tokens.equal(batch.tokens)


def test_an_epoch_reads_every_sample_once_and_the_next_one_again(prepared: Prepared, make_texts: MakeTexts) -> None:
    dataset = prepared(make_texts(60))
    size = dataset.num_train_samples
    first, second = dataset.batch(0, size), dataset.batch(size, size)

    assert sorted(first.sample_ids.tolist()) == sorted(second.sample_ids.tolist()) == list(range(size))
    assert first.sample_ids.tolist() != second.sample_ids.tolist()
    straddling = dataset.batch(size - 2, 4)
    assert straddling.sample_ids.tolist() == [*first.sample_ids[-2:].tolist(), *second.sample_ids[:2].tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_read_the_same_batch_at_every_world_size(
    prepared: Prepared, make_texts: MakeTexts, world_size: int
) -> None:
    dataset = prepared(make_texts(60))
    whole = dataset.batch(24, 8)
    rows = 8 // world_size
    parts = [dataset.batch(24 + rank * rows, rows) for rank in range(world_size)]

    assert torch.cat([part.tokens for part in parts]).equal(whole.tokens)
    assert torch.cat([part.sample_ids for part in parts]).equal(whole.sample_ids)


def test_seed_changes_the_order_and_nothing_else(prepared: Prepared, make_texts: MakeTexts) -> None:
    texts = make_texts(60)
    one, again, other = prepared(texts, seed=1), prepared(texts, seed=1), prepared(texts, seed=2)

    assert one.batch(0, 20).tokens.equal(again.batch(0, 20).tokens)
    assert not one.batch(0, 20).tokens.equal(other.batch(0, 20).tokens)
    assert one.provenance == other.provenance


def test_training_reads_the_documents_that_are_not_held_out(prepared: Prepared, make_texts: MakeTexts) -> None:
    texts = make_texts(100)
    train, held = split(texts, 0.1)
    dataset = prepared(texts, holdout=0.1)

    assert dataset.num_train_tokens == sum(len(text.encode()) + 1 for text in train)
    assert dataset.num_eval_tokens == sum(len(text.encode()) + 1 for text in held)
    assert dataset.provenance["sources"][0]["held_out_documents"] == len(held)
    seen = in_order(dataset)
    assert len(seen) > 0.99 * len("".join(train))
    assert "".join(train).startswith(seen)


def test_evaluation_reads_the_held_out_documents_to_the_last_token(prepared: Prepared, make_texts: MakeTexts) -> None:
    texts = make_texts(100)
    dataset = prepared(texts, holdout=0.1)
    batches = list(dataset.eval_batches(4, 10**6))
    ids = torch.cat([batches[0].tokens[0, :1], *[batch.targets[batch.targets != NOT_COUNTED] for batch in batches]])

    assert dataset.tokenizer.decode(ids.tolist()) == "".join(split(texts, 0.1)[1])
    assert ids.numel() == dataset.num_eval_tokens
    assert ids[-1] == dataset.tokenizer.end_of_document


def test_small_corpus_still_holds_out_a_document(prepared: Prepared, make_texts: MakeTexts) -> None:
    dataset = prepared(make_texts(2, max_words=200), holdout=1e-6)

    assert dataset.provenance["sources"][0]["held_out_documents"] == 1


def test_nothing_is_held_out_when_asked(prepared: Prepared, make_texts: MakeTexts) -> None:
    dataset = prepared(make_texts(10), holdout=0)

    assert dataset.num_eval_tokens == dataset.num_eval_samples == 0
    assert list(dataset.eval_batches(4, 1000)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_tokens", [16, 200, 10**6])
def test_every_held_out_sample_is_on_exactly_one_rank(
    prepared: Prepared, make_texts: MakeTexts, world_size: int, max_tokens: int
) -> None:
    dataset = prepared(make_texts(60), holdout=0.2)
    (alone,) = eval_ids(dataset, 3, max_tokens)
    ranks = eval_ids(dataset, 3, max_tokens, world_size)

    assert sorted(i for rank in ranks for i in rank) == sorted(alone)
    assert len(alone) == len(set(alone)) == min(dataset.num_eval_samples, max_tokens // 16)


def test_evaluation_keeps_ranks_in_step(prepared: Prepared, make_texts: MakeTexts) -> None:
    dataset = prepared(make_texts(60), holdout=0.2)
    counts = [[len(batch.tokens) for batch in dataset.eval_batches(3, 7 * 16, rank=r, world_size=2)] for r in (0, 1)]
    padding = list(dataset.eval_batches(3, 7 * 16, rank=1, world_size=2))[-1]

    assert counts[0] == counts[1] == [3, 3]
    assert padding.sample_ids.tolist() == [-1, -1, -1]
    assert (padding.targets == NOT_COUNTED).all()
    assert dataset.target_bytes(padding) == 0


def test_limited_evaluation_spreads_over_all_held_out_text(prepared: Prepared, make_texts: MakeTexts) -> None:
    dataset = prepared(make_texts(100), holdout=0.3)
    (ids,) = eval_ids(dataset, 4, 10 * 16)

    assert len(ids) == 10
    assert max(ids) > 0.85 * dataset.num_eval_samples
    assert np.diff(ids).max() - np.diff(ids).min() <= 1


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocab_size": 300}], ids=["bytes", "bpe"])
def test_target_bytes_are_exactly_those_of_the_text(prepared: Prepared, make_texts: MakeTexts, tokenizer: Any) -> None:
    texts = make_texts(100)
    dataset = prepared(texts, tokenizer=tokenizer, holdout=0.2)
    batches = list(dataset.eval_batches(4, 10**6))
    sizes = dataset.tokenizer.token_bytes
    assert sizes is not None
    no_target = int(sizes[batches[0].tokens[0, 0]])  # the first token of all

    counted = sum(dataset.target_bytes(batch) for batch in batches)
    assert counted + no_target == sum(len(text.encode()) for text in split(texts, 0.2)[1])


def save_word_tokenizer(path: Path, texts: list[str]) -> str:
    """A tokenizer.json that loses white space, so that its tokens do not tell how many bytes they stand for."""
    words = sorted({word for text in texts for word in text.split()})
    vocab = {word: token for token, word in enumerate(["<unk>", "</s>", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(path))
    return str(path)


def test_target_bytes_of_other_tokenizers_are_counted_in_the_held_out_text(
    prepared: Prepared, make_texts: MakeTexts, tmp_path: Path
) -> None:
    texts = make_texts(100)
    dataset = prepared(texts, tokenizer=save_word_tokenizer(tmp_path / "words.json", texts), holdout=0.2)
    counted = sum(dataset.target_bytes(batch) for batch in dataset.eval_batches(4, 10**6))

    assert counted == pytest.approx(sum(len(text.encode()) for text in split(texts, 0.2)[1]), rel=0.02)


def test_mixture_reads_each_source_by_its_weight(
    prepared: Prepared, make_texts: MakeTexts, write_jsonl: WriteJsonl
) -> None:
    sources = [
        {"kind": "jsonl", "paths": [str(write_jsonl(["a" * 40] * 3 + make_texts(2), name="a.jsonl"))], "weight": 3},
        {"kind": "jsonl", "paths": [str(write_jsonl(make_texts(90), name="b.jsonl"))], "weight": 1},
    ]
    dataset = prepared(source=sources, holdout=0.05)
    first_of_b = dataset.sources[0].train.num_samples
    ids = dataset.batch(0, 400).sample_ids

    assert dataset.num_train_samples == first_of_b + dataset.sources[1].train.num_samples
    assert int((ids < first_of_b).sum()) == 300
    assert set(ids[ids < first_of_b].tolist()) == set(range(first_of_b))
    assert [facts["weight"] for facts in dataset.provenance["sources"]] == [3, 1]


def test_stdlib_holds_out_the_same_modules_of_code_and_prose(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        path = tmp_path / "lib" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""Docstring of {number}: {"words " * number}"""\nx = {number}\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))

    def held_out_modules(part: str) -> set[int]:
        dataset = prepared(source={"kind": "python-stdlib", "part": part}, holdout=0.2)
        text = dataset.tokenizer.decode(
            [
                token
                for batch in dataset.eval_batches(1, 10**6)
                for token in batch.targets.flatten().tolist()
                if token >= 0
            ]
        )
        return {int(line.split(":")[0]) for line in text.split("ocstring of ")[1:]}

    code = held_out_modules("code")
    assert code == held_out_modules("prose")
    assert 2 <= len(code) <= 20


def test_megatron_shards_are_read_in_place(prepared: Prepared, make_texts: MakeTexts, tmp_path: Path) -> None:
    texts = make_texts(60)
    built = prepared(texts, holdout=0.1)
    (prefix,) = (path.with_suffix("") for path in (tmp_path / "cache").glob("*/tokens.bin"))
    direct = prepared(source={"kind": "megatron", "prefixes": [str(prefix)]}, holdout=0.1, cache=str(tmp_path / "none"))

    assert direct.batch(0, 10).tokens.equal(built.batch(0, 10).tokens)
    assert direct.num_eval_tokens == built.num_eval_tokens
    assert not (tmp_path / "none").exists()


def test_bare_megatron_shards_of_several_prefixes(prepared: Prepared, write_shard: Callable[..., Path]) -> None:
    prefixes = [write_shard([[i] * 30 + [256] for i in range(20)], name=f"part{part}") for part in range(2)]
    source = {"kind": "megatron", "prefixes": [str(prefix) for prefix in prefixes]}
    dataset = prepared(source=source, holdout=0.1)
    held_out_documents = dataset.provenance["sources"][0]["held_out_documents"]

    assert 0 < held_out_documents < 20
    assert dataset.num_train_tokens == (40 - held_out_documents) * 31
    assert dataset.provenance["sources"][0]["sha256"] is None
    assert dataset.notices == ()


def test_megatron_shards_without_ends_of_documents_give_a_notice(
    prepared: Prepared, write_shard: Callable[..., Path]
) -> None:
    source = {"kind": "megatron", "prefixes": [str(write_shard([[1] * 40, [2] * 40]))]}

    assert "do not end with the tokenizer's end-of-document token 256" in prepared(source=source).notices[0]


def test_shards_of_another_tokenizer_name_both(prepared: Prepared, make_texts: MakeTexts, tmp_path: Path) -> None:
    texts = make_texts(60)
    prepared(texts)
    (prefix,) = (path.with_suffix("") for path in (tmp_path / "cache").glob("*/tokens.bin"))
    words = save_word_tokenizer(tmp_path / "words.json", texts)

    with pytest.raises(DataError, match=r"made with the tokenizer bytes \(.*data\.tokenizer is .*words\.json \("):
        prepared(source={"kind": "megatron", "prefixes": [str(prefix)]}, tokenizer=words)


def test_bare_shard_with_tokens_beyond_the_vocabulary(prepared: Prepared, write_shard: Callable[..., Path]) -> None:
    prefix = write_shard([[1] * 40, [50_000] * 40])

    with pytest.raises(DataError, match=r"token number 40 is 50000, and data\.tokenizer has the tokens 0 to 256"):
        prepared(source={"kind": "megatron", "prefixes": [str(prefix)]})


def test_cached_shard_cut_short_is_noticed(prepared: Prepared, make_texts: MakeTexts, tmp_path: Path) -> None:
    prepared(make_texts(60))
    (path,) = (tmp_path / "cache").glob("*/tokens.bin")
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(DataError, match=r"tokens\.bin: expected \d+ bytes .* and found 100"):
        prepared(make_texts(60))


def test_later_phase_keeps_the_tokenizer_of_the_first(
    make_texts: MakeTexts, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    def config(texts: list[str], name: str, vocab_size: int = 300) -> DataConfig:
        return DataConfig(
            source={"kind": "jsonl", "paths": [str(write_jsonl(texts, name))]},
            tokenizer={"kind": "bpe", "vocab_size": vocab_size},
            seq_len=16,
            cache=str(tmp_path / "cache"),
        )

    first = prepare(config(make_texts(80), "first.jsonl"))
    saved = tokenizer_from_json(json.loads(json.dumps(first.tokenizer.to_json())))
    second_config = config(make_texts(80, seed=1), "second.jsonl")
    second = prepare(second_config, tokenizer=saved)

    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint != prepare(second_config).tokenizer.fingerprint
    with pytest.raises(DataError, match=r"is bpe with 290 tokens, and the run's is bpe with 300 tokens"):
        prepare(config(make_texts(80), "first.jsonl", 290), tokenizer=saved)


def test_bpe_is_trained_on_training_documents_only(prepared: Prepared) -> None:
    texts = [f"{chr(0x4E00 + number)} " * 30 for number in range(40)]  # each document has a character of its own
    train, held = split(texts, 0.2)
    bpe = {"kind": "bpe", "vocab_size": 257 + len(train)}
    tokenizer = prepared(texts, tokenizer=bpe, holdout=0.2).tokenizer

    assert tokenizer.fingerprint == prepared(train, tokenizer=bpe, holdout=0).tokenizer.fingerprint
    assert tokenizer.fingerprint != prepared(texts, tokenizer=bpe, holdout=0).tokenizer.fingerprint
    assert held


def test_bpe_without_text_is_an_error(prepared: Prepared, write_shard: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer\.kind=bpe is trained on text"):
        prepared(source={"kind": "megatron", "prefixes": [str(write_shard([[1]]))]}, tokenizer={"kind": "bpe"})


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocab_size": 300}], ids=["bytes", "bpe"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; there is no text"),
        (b" \n \n", "is empty; there is no text"),
        (b"fine--\xff--", r"corpus\.txt: byte 6 \(0xff\)"),
    ],
    ids=["empty", "blank", "undecodable"],
)
def test_text_that_is_no_corpus(
    prepared: Prepared, tmp_path: Path, tokenizer: Any, content: bytes, message: str
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)

    with pytest.raises(DataError, match=message):
        prepared(source={"kind": "text", "paths": [str(path)], "separator": "--"}, tokenizer=tokenizer)


def test_corpus_smaller_than_a_sample_is_an_error(prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"8 training tokens are fewer than one sample of data\.seq_len=16"):
        prepared(["abc", "abc"], holdout=0)


def test_single_document_cannot_be_held_out(prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"data\.holdout=0\.01: nothing can be held out.*single document"):
        prepared(["word " * 50])


def test_description_says_what_the_corpus_is(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A paragraph of some length.\n\n" * 30 + "And another one.\n\n" * 30)
    dataset = prepared(source={"kind": "text", "paths": [str(path)], "max_document_bytes": 100})
    lines = describe(dataset)

    assert lines[0].startswith("tokenizer  bytes: 257 tokens")
    assert f"{path}" in lines[1]
    assert f"{dataset.num_train_samples} samples of 16" in lines[2]
    assert "cut at blank lines" in lines[-1]
    json.dumps(dataset.provenance)


def test_progress_names_the_stage_and_reaches_the_end(
    make_texts: MakeTexts, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    path = write_jsonl(make_texts(50))
    seen: dict[str, tuple[int, int | None]] = {}
    config = DataConfig(source={"kind": "jsonl", "paths": [str(path)]}, seq_len=16, cache=str(tmp_path / "cache"))
    prepare(config, on_progress=lambda stage, done, total: seen.update({stage: (done, total)}))

    size = path.stat().st_size
    assert seen == {f"reading {path}": (size, size), f"tokenizing {path}": (size, size)}

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.tokenizer import (
    ByteTokenizer,
    SubwordTokenizer,
    read_tokenizer_file,
    tokenizer_from_json,
    train_bpe,
)
from sparsetrain.errors import DataError


@pytest.fixture
def bpe(make_texts: Callable[..., list[str]]) -> SubwordTokenizer:
    return train_bpe(iter(make_texts(200)), 300)


def save(inner: tokenizers.Tokenizer, path: Path) -> str:
    inner.save(str(path))
    return str(path)


def word_level(*words: str) -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are words without the white space around them."""
    vocab = {word: token for token, word in enumerate(("<unk>", *words))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return inner


@given(st.text())
def test_bytes_round_trip_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)

    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.end_of_document]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0


def test_bytes_that_are_no_text_decode_to_replacements() -> None:
    assert ByteTokenizer().decode([0x61, 0xFF]) == "a\ufffd"


def test_bpe_round_trips_text_it_never_saw(bpe: SubwordTokenizer) -> None:
    text = "Ünseen  text\twith\n\n\x00 🙃 and the lazy dog"
    ids = bpe.encode(text)

    assert bpe.decode(ids) == text
    assert bpe.token_bytes is not None
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert bpe.token_bytes[bpe.end_of_document] == 0
    assert ids.size < len(text.encode())


def test_bpe_has_the_size_asked_for(bpe: SubwordTokenizer) -> None:
    assert bpe.vocab_size == 300
    assert 0 <= bpe.end_of_document < 300


def test_bpe_of_the_same_texts_is_the_same(bpe: SubwordTokenizer, make_texts: Callable[..., list[str]]) -> None:
    again = train_bpe(iter(make_texts(200)), 300)
    other = train_bpe(iter(make_texts(200, seed=1)), 300)

    assert again.fingerprint == bpe.fingerprint != other.fingerprint


def test_bpe_of_too_little_text_says_how_many_tokens_there_can_be() -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size=5000: .* give 2\d\d tokens"):
        train_bpe(iter(["only this"]), 5000)


def test_a_document_cannot_forge_the_end_of_one(bpe: SubwordTokenizer) -> None:
    ids = bpe.encode("before<|endoftext|>after")

    assert bpe.end_of_document not in ids
    assert bpe.decode(ids) == "before<|endoftext|>after"


def test_encode_batch_is_encode_of_each(bpe: SubwordTokenizer) -> None:
    texts = ["the quick fox", "", "東京"]

    for tokenizer in (bpe, ByteTokenizer()):
        encoded = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text).tolist() for text in texts]
        assert all(ids.dtype == np.int64 for ids in encoded)


def test_tokenizers_survive_json(bpe: SubwordTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
        assert again.fingerprint == tokenizer.fingerprint
        assert again.name == tokenizer.name
        assert again.encode("the lazy dog 🙂").tolist() == tokenizer.encode("the lazy dog 🙂").tolist()


def test_json_of_something_else_is_an_error() -> None:
    with pytest.raises(DataError, match=r"expected a saved tokenizer and found the keys \['model'\]"):
        tokenizer_from_json({"model": 1})


def test_file_neither_truncates_nor_pads_nor_adds_tokens(tmp_path: Path) -> None:
    inner = word_level("a", "b", "</s>")
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    tokenizer = read_tokenizer_file(save(inner, tmp_path / "tokenizer.json"), None)

    assert tokenizer.encode("a b a").tolist() == [1, 2, 1]
    assert tokenizer.encode_batch(["a b a"])[0].tolist() == [1, 2, 1]


def test_file_of_words_knows_no_bytes_of_a_token(tmp_path: Path) -> None:
    assert read_tokenizer_file(save(word_level("a", "<eos>"), tmp_path / "t.json"), None).token_bytes is None


def test_tokens_added_to_a_byte_level_file_count_their_own_bytes(bpe: SubwordTokenizer, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(json.dumps(bpe.to_json()["tokenizer"]))
    inner.add_tokens(["東東東"])
    tokenizer = read_tokenizer_file(save(inner, tmp_path / "t.json"), None)
    ids = tokenizer.encode("x東東東")

    assert ids.size == 2
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes[ids].tolist() == [1, 9]


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_file_ends_documents_with_a_token_it_has(tmp_path: Path, end: str) -> None:
    path = save(word_level("a", end), tmp_path / "t.json")

    assert read_tokenizer_file(path, None).end_of_document == 2
    assert read_tokenizer_file(path, "a").end_of_document == 1


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (None, r"has none of .*</s>.*data\.tokenizer\.end_of_document"),
        ("<endoftext>", r"end_of_document='<endoftext>' is no token of .*did you mean '<end_of_text>'\?"),
    ],
)
def test_file_without_an_end_of_document(tmp_path: Path, end: str | None, message: str) -> None:
    path = save(word_level("a", "<end_of_text>"), tmp_path / "t.json")

    with pytest.raises(DataError, match=message):
        read_tokenizer_file(path, end)


def test_file_that_is_missing_or_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer\.path=.*none\.json: cannot be read"):
        read_tokenizer_file(str(tmp_path / "none.json"), None)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer\.json"):
        read_tokenizer_file(str(tmp_path / "bad.json"), None)


def test_fingerprint_follows_content_and_end_of_document(tmp_path: Path) -> None:
    def fingerprint(path: str, end: str) -> str:
        return read_tokenizer_file(path, end).fingerprint

    one = save(word_level("a", "b"), tmp_path / "1.json")
    same = save(word_level("a", "b"), tmp_path / "2.json")
    other = save(word_level("b", "a"), tmp_path / "3.json")

    assert fingerprint(one, "a") == fingerprint(same, "a")
    assert len({fingerprint(one, "a"), fingerprint(one, "b"), fingerprint(other, "a")}) == 3

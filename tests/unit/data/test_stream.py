import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsetrain.data.shards import TokenShard
from sparsetrain.data.stream import TokenStream
from sparsetrain.errors import DataError

WriteShard = Callable[..., Path]

documents = st.tuples(st.integers(0, 12), st.booleans())
corpora = st.lists(st.lists(documents, max_size=8), min_size=1, max_size=3)


def read(stream: TokenStream, sample: int, seq_len: int) -> tuple[list[int], list[int]]:
    tokens = np.full(seq_len + 1, -9, dtype=np.int64)
    starts = np.zeros(seq_len + 1, dtype=np.int32)
    count = stream.read(sample, tokens, starts)
    return tokens[:count].tolist(), np.cumsum(starts[:count]).tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpora, st.integers(1, 9))
def test_samples_are_the_chosen_documents_laid_end_to_end(
    write_shard: WriteShard, corpora: list[list[tuple[int, bool]]], seq_len: int
) -> None:
    shards, masks, expected_tokens, expected_documents = [], [], [], []
    number = token = 0
    for i, corpus in enumerate(corpora):
        contents = []
        for length, is_chosen in corpus:
            contents.append(list(range(token, token + length)))
            token += length
            if is_chosen:
                expected_tokens += contents[-1]
                expected_documents += [number] * length
            number += 1
        shards.append(TokenShard(write_shard(contents, name=f"shard{i}")))
        masks.append(np.array([is_chosen for _, is_chosen in corpus], dtype=np.bool_))
    stream = TokenStream(shards, masks, seq_len, vocab_size=1000)

    assert stream.num_tokens == len(expected_tokens)
    assert stream.num_samples == max(0, len(expected_tokens) - 1) // seq_len
    for sample in range(stream.num_samples + 1):
        first = sample * seq_len
        tokens, ids = read(stream, sample, seq_len)
        assert tokens == expected_tokens[first : first + seq_len + 1]
        expected_ids = expected_documents[first : first + seq_len + 1]
        boundaries = [a != b for a, b in itertools.pairwise(expected_ids)]
        assert np.diff(ids).tolist() == boundaries
        assert ids[:1] in ([], [0])


def test_token_of_another_vocabulary_is_an_error_with_its_place(write_shard: WriteShard) -> None:
    shard = TokenShard(write_shard([[1, 2, 3], [4, 5, 999]]))
    stream = TokenStream([shard], [np.array([False, True])], 2, vocab_size=257)

    with pytest.raises(DataError, match=r"shard\.bin: token number 5 is 999"):
        read(stream, 0, 2)

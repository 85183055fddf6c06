from typing import Any

import pytest

from sparsetrain.config import RunConfig
from sparsetrain.errors import ConfigError
from sparsetrain.training.attention_check import check_attention


def run(*heads: Any, within_documents: bool = False) -> RunConfig:
    attention = {"kind": "block_sparse", "block": 16, "heads": list(heads), "within_documents": within_documents}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "model": {"dim": 32, "num_layers": 2, "num_heads": 4, "attention": attention},
            "data": {"source": {"kind": "python-stdlib", "part": "code"}, "seq_len": 100},
            "train": {"tokens": 800, "batch_tokens": 400},
        }
    )


LOCAL = {"kind": "local", "width": 1}
STRIDED = {"kind": "strided", "stride": 2}
FIRST = {"kind": "strided", "stride": 3, "offset": 0}


@pytest.mark.parametrize(
    ("heads", "within_documents", "expected"),
    [
        (
            [STRIDED],
            False,
            r"heads\.0: {kind: strided, stride: 2}: block 0 of the queries of head 1 sees no key \(1 of 7 blocks\)",
        ),
        ([LOCAL, {**STRIDED, "offset": 1}], False, r"heads\.1: .* of head 1 sees no key"),
        (
            [{"kind": "intersection", "of": [LOCAL, FIRST]}],
            False,
            r"heads\.0: .*block 1 of the queries of head 0 sees no key \(4 of 7 blocks\); combine it with the nearest",
        ),
        ([FIRST], True, r"heads\.0: .*block 1 of the queries of head 0 does not see itself, and with within_documents"),
        (
            [LOCAL, {"kind": "sink", "width": 2}],
            True,
            r"heads\.1: .* block 2 of the queries of head 1 does not see itself",
        ),
        ([LOCAL, {"kind": "random", "count": 2}], True, r"heads\.1: .* does not see itself"),
    ],
    ids=["strided", "offset", "intersection", "documents", "sink-documents", "random-documents"],
)
def test_a_pattern_that_leaves_a_query_without_keys_is_refused(heads, within_documents, expected):
    with pytest.raises(ConfigError, match=r"model\.attention\." + expected):
        check_attention(run(*heads, within_documents=within_documents))


@pytest.mark.parametrize(
    ("heads", "within_documents"),
    [
        ([FIRST], False),
        ([{"kind": "random", "count": 1}], False),
        ([{"kind": "union", "of": [STRIDED, LOCAL]}, "dense", {"kind": "dilated", "width": 2, "dilation": 2}], True),
    ],
    ids=["first-block", "random", "own-block-and-documents"],
)
def test_a_pattern_that_leaves_no_query_without_keys_is_taken(heads, within_documents):
    check_attention(run(*heads, within_documents=within_documents))

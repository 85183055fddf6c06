import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsetrain.config.data import DataConfig
from sparsetrain.data import Dataset, prepare
from sparsetrain.data.shards import ShardWriter

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "naïve", "façades", "東京", "🙂"]


@pytest.fixture
def make_texts() -> Callable[..., list[str]]:
    """Distinct texts of a few to many words, multi-byte characters among them."""

    def make(count: int, max_words: int = 60, seed: int = 0) -> list[str]:
        rng = random.Random(seed)
        return [
            f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, max_words))) + "\n" for number in range(count)
        ]

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(texts: Sequence[str], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """A bare .bin/.idx pair, as another program would leave it."""

    def write(documents: Sequence[Sequence[int]], name: str = "shard", dtype: str = "<u2") -> Path:
        prefix = tmp_path / name
        with ShardWriter(prefix, np.dtype(dtype)) as writer:
            for document in documents:
                writer.add_document(np.array(document, dtype=np.int64))
        return prefix

    return write


@pytest.fixture
def prepared(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., Dataset]:
    """Prepare a JSON-lines corpus of some texts, or any other source."""

    def make(texts: Sequence[str] = (), *, source: Any = None, seed: int = 0, **config: Any) -> Dataset:
        config = {"seq_len": 16, "cache": str(tmp_path / "cache"), **config}
        if source is None:
            source = {"kind": "jsonl", "paths": [str(write_jsonl(texts))]}
        return prepare(DataConfig(source=source, **config), seed=seed)

    return make

from pathlib import Path

import pytest

from sparsetrain.errors import RunFolderError
from sparsetrain.training import TrainedRun

CONFIG = """
name: tiny
model: {dim: 32, num_layers: 1, num_heads: 2}
data: {seq_len: 64}
train: {tokens: 4Ki, batch_tokens: 1Ki}
"""


@pytest.mark.parametrize(
    "content",
    [b'{"kind": "byt', b"", b"\xff\xfe", b"3", b'["bytes"]', b'{"kind": "other"}'],
    ids=["cut-short", "empty", "not-utf8", "number", "list", "other-kind"],
)
def test_damaged_tokenizer_is_named_with_its_fix(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"tokenizer\.json: cannot be read \(.*config\.yaml --resume"):
        TrainedRun.load(tmp_path)

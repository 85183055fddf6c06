from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetrain.config import InvalidConfig, load_config
from sparsetrain.errors import ConfigError

SMALLEST = """\
name: tiny
model: {dim: 8, num_layers: 1, num_heads: 2}
train: {tokens: 4Ki, batch_tokens: 1Ki}
"""


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """A file with only the keys that a run must have."""
    path = tmp_path / "smallest.yaml"
    path.write_text(SMALLEST)
    return path


@pytest.fixture
def mistakes(tmp_path: Path) -> Callable[..., list[str]]:
    """What load_config finds wrong with a text and overrides: a line each, with the file called bad.yaml."""

    def find(text: str | bytes, *overrides: str, world_size: int | None = None) -> list[str]:
        path = tmp_path / "bad.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides, world_size=world_size)
        lines = str(caught.value).replace(str(path), "bad.yaml").splitlines()
        if isinstance(caught.value, InvalidConfig):
            assert lines[0].startswith("bad.yaml has "), "the first line counts"
            assert len(lines) == 2 + len(caught.value.problems), "then one line for each problem"
            return lines[2:]
        return lines

    return find

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from sparsetrain.config import RunConfig, dump_config
from sparsetrain.errors import RunFolderError
from sparsetrain.report.attention_layouts import plot_attention_layouts


def folder_of(folder: Path, attention: Any, num_heads: int = 4) -> Path:
    config = {
        "name": "run",
        "model": {"dim": 8 * num_heads, "num_layers": 2, "num_heads": num_heads, "attention": attention},
        "data": {"seq_len": 256},
        "train": {"tokens": 4096, "batch_tokens": 1024},
    }
    (folder / "config.yaml").write_text(dump_config(RunConfig.model_validate(config)))
    return folder


def sparse(*heads: Any) -> dict[str, Any]:
    return {"kind": "block_sparse", "block": 16, "heads": list(heads)}


STRIDED = {"kind": "union", "of": [{"kind": "local", "width": 1}, {"kind": "strided", "stride": 4}]}


def test_each_head_has_a_panel_up_to_sixteen(tmp_path: Path) -> None:
    four, twenty = (imread(plot_attention_layouts(folder_of(tmp_path, sparse(STRIDED), number))) for number in (4, 20))
    assert 3 < twenty.shape[0] / four.shape[0] < 4.5  # four rows of four, not five


def test_heads_that_are_alike_share_a_panel(tmp_path: Path) -> None:
    one, four = (
        imread(plot_attention_layouts(folder_of(tmp_path, sparse(pattern)))).shape[1]
        for pattern in ({"kind": "local", "width": 2}, STRIDED)
    )
    assert four > 3 * one


def test_dense_attention_has_no_picture(tmp_path: Path) -> None:
    assert plot_attention_layouts(tmp_path) is None
    assert plot_attention_layouts(folder_of(tmp_path, "dense")) is None
    assert not (tmp_path / "attention_layouts.png").exists()


def test_a_picture_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, sparse(STRIDED))
    (folder / "attention_layouts.png").mkdir()
    with pytest.raises(RunFolderError, match=r"attention_layouts\.png: .*; free space or make the folder writable"):
        plot_attention_layouts(folder)

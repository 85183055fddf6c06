import errno
import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue

import pytest

from sparsetrain.config.data import DataConfig, TextFiles
from sparsetrain.data import prepare, shards
from sparsetrain.data.building import source_hash
from sparsetrain.data.cache import build_once, no_progress
from sparsetrain.data.sources import open_source
from sparsetrain.data.sources.jsonl import JsonLinesSource
from sparsetrain.errors import DataError


def test_folder_is_built_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "content").write_text("whole")

    first = build_once(tmp_path / "cache", "thing", build)
    second = build_once(tmp_path / "cache", "thing", build)
    assert first == second == tmp_path / "cache" / "thing"
    assert (first / "content").read_text() == "whole"
    assert len(built) == 1


def test_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise DataError("no more text")

    with pytest.raises(DataError, match="no more text"):
        build_once(tmp_path, "thing", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]
    assert build_once(tmp_path, "thing", lambda folder: None).is_dir()


def test_leftovers_of_a_killed_builder_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".thing.partial-dead").mkdir()
    (tmp_path / ".thing.partial-dead" / "content").write_text("half")
    (tmp_path / ".other.partial-alive").mkdir()

    build_once(tmp_path, "thing", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-alive", ".thing.lock", "thing"]


def test_unwritable_cache_names_key_and_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # unlike a mode, this stops root too

    with pytest.raises(DataError, match=r"data\.cache=.*file/cache: cannot be written .*point data\.cache"):
        build_once(tmp_path / "file" / "cache", "thing", lambda folder: None)


def test_full_disk_while_building_leaves_no_half_made_cache(
    tmp_path: Path,
    make_texts: Callable[..., list[str]],
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = str(write_jsonl(make_texts(50)))
    config = DataConfig(source={"kind": "jsonl", "paths": [corpus]}, seq_len=16, cache=str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_durably", full)
        with pytest.raises(DataError, match=r"data\.cache=.*the disk is full.*Nothing half-made was left"):
            prepare(config)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "stamps"]
    assert prepare(config).num_train_samples > 0


def test_file_elsewhere_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    missing = tmp_path / "corpus.txt"

    with pytest.raises(DataError, match=r"corpus\.txt: cannot be read \(No such file") as caught:
        build_once(tmp_path / "cache", "thing", lambda folder: _open(missing))
    assert "data.cache" not in str(caught.value)
    with pytest.raises(DataError, match=r"data\.cache=.*cannot be written"):
        build_once(tmp_path / "cache", "thing", lambda folder: _open(folder / "missing"))


def _open(path: Path) -> None:
    path.open().close()


def test_disk_of_the_corpus_that_fails_is_not_blamed_on_the_cache(
    tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = str(write_jsonl(["one", "two"]))
    config = DataConfig(source={"kind": "jsonl", "paths": [corpus]}, seq_len=16, cache=str(tmp_path / "cache"))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for method in ("documents", "content_hash"):
        with monkeypatch.context() as patch:
            patch.setattr(JsonLinesSource, method, fail)
            with pytest.raises(DataError, match=r"data\.source .*corpus\.jsonl: cannot be read .*Input/output error"):
                prepare(config)


def test_compressed_file_that_is_all_in_the_buffer_is_reported_done_once(
    tmp_path: Path, make_texts: Callable[..., list[str]]
) -> None:
    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in make_texts(50)).encode()))
    source = {"kind": "jsonl", "paths": [str(corpus)]}
    shown: list[tuple[str, int]] = []
    prepare(
        DataConfig(source=source, seq_len=16, cache=str(tmp_path / "cache")),
        on_progress=lambda stage, done, total: shown.append((stage, done)),
    )
    tokenized = [done for stage, done in shown if stage.startswith("tokenizing")]
    assert tokenized == [corpus.stat().st_size]


def _prepare_at_once(config: DataConfig, barrier: Barrier, results: "Queue[tuple[int, str, list[int]]]") -> None:
    stages: list[str] = []
    barrier.wait()
    dataset = prepare(config, on_progress=lambda stage, done, total: stages.append(stage))
    built = sum(stage.startswith("tokenizing") for stage in stages)
    results.put((built, str(dataset.provenance), dataset.batch(0, 4).tokens.flatten().tolist()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_build_at_once_give_one_result(
    tmp_path: Path, make_texts: Callable[..., list[str]], write_jsonl: Callable[..., Path]
) -> None:
    corpus = str(write_jsonl(make_texts(500)))
    config = DataConfig(source={"kind": "jsonl", "paths": [corpus]}, seq_len=16, cache=str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")  # spawned ones would import torch again, for seconds
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_prepare_at_once, args=(config, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()

    assert sorted(built > 0 for built, _, _ in answers) == [False, False, True]
    assert len({provenance for _, provenance, _ in answers}) == 1
    assert answers[0][2] == answers[1][2] == answers[2][2]
    assert len(list((tmp_path / "cache").glob("jsonl-*"))) == 1


def test_content_is_read_again_only_when_a_file_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def hash_and_read(text: str | None = None, age_s: float = 60) -> tuple[str, int]:
        if text is not None:
            path.write_text(text)
            long_ago = time.time() - age_s
            os.utime(path, (long_ago, long_ago))
        source = open_source(TextFiles(kind="text", paths=(str(path),)))
        shown: list[int] = []
        digest = source_hash(source, tmp_path / "cache", lambda stage, done, total: shown.append(done))
        return digest, sum(shown)

    first = hash_and_read("one")
    assert first[1] == 3
    assert hash_and_read() == (first[0], 0)
    assert hash_and_read("two", age_s=50)[0] != first[0]
    assert hash_and_read("six", age_s=0)[1] == hash_and_read()[1] == 3  # just written: not to be trusted yet


def test_read_only_cache_that_is_complete_is_used(tmp_path: Path) -> None:
    build_once(tmp_path, "thing", lambda folder: None)
    (tmp_path / ".thing.lock").unlink()

    def fail(folder: Path) -> None:
        raise AssertionError

    build_once(tmp_path, "thing", fail, no_progress)
    assert not (tmp_path / ".thing.lock").exists()

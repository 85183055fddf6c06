import json
from pathlib import Path

import pytest

from sparsetrain.checkpoint import latest_checkpoint, load_weights, verify_checkpoint
from sparsetrain.errors import CheckpointError

FILES = ["manifest.json", ".metadata", "__0_0.distcp", "state.pt", "rank-00000.pt"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete])
@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_is_found_and_named(run, name, damage):
    path = run.save(10)
    assert {file.name for file in path.iterdir()} == set(FILES)
    before = [shard.local_weight().clone() for shard in run.shards]
    verify_checkpoint(path)
    damage(path / name)
    for attempt in (verify_checkpoint, run.load, lambda path: load_weights(path, run.shards)):
        with pytest.raises(CheckpointError, match=str(path / name)):
            attempt(path)
    assert all((old == shard.local_weight()).all() for old, shard in zip(before, run.shards, strict=True))


def test_every_single_bit_of_the_manifest_counts(run):
    manifest = run.save(10) / "manifest.json"
    content = manifest.read_bytes()
    for position in range(0, len(content), 5):
        changed = bytearray(content)
        changed[position] ^= 1
        if json_of(bytes(changed)) == json.loads(content):
            continue  # between two tokens: still the same manifest
        manifest.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify_checkpoint(manifest.parent)


def json_of(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_notice(run):
    older, newest = run.save(10), run.save(20)
    flip_a_bit(newest / "__0_0.distcp")
    notices: list[str] = []
    assert latest_checkpoint(run.folder, on_damaged=notices.append) == older
    assert len(notices) == 1
    assert "step-00000020/__0_0.distcp: damaged" in notices[0]
    assert notices[0].endswith("Going back to step-00000010")
    with pytest.warns(UserWarning, match="Going back to step-00000010"):
        assert latest_checkpoint(run.folder) == older
    with pytest.warns(UserWarning, match="Going back"):
        assert load_weights(run.folder, run.shards) == older


def test_when_none_is_intact_each_is_named(run):
    for step in (10, 20):
        delete(run.save(step) / ".metadata")
    with pytest.raises(CheckpointError, match=r"none|no checkpoint is intact.*step-00000020.*step-00000010"):
        latest_checkpoint(run.folder)


def test_a_damaged_newest_gives_way_to_what_is_saved_after_it(run):
    older, newest = run.save(10), run.save(20)
    truncate(newest / "state.pt")
    with pytest.warns(UserWarning, match="Going back"):
        run.load(latest_checkpoint(run.folder))
    again = run.save(20)
    assert latest_checkpoint(run.folder) == again
    assert sorted(run.folder.iterdir()) == [older, again]


def test_another_format_is_an_error_and_not_damage(run, monkeypatch):
    run.save(10)
    monkeypatch.setattr("sparsetrain.checkpoint.folder.FORMAT", 2)
    run.save(20)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, and this version reads format 1"):
        latest_checkpoint(run.folder)

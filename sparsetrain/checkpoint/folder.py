"""What lies on the disk: checkpoint folders, their manifest, and how a folder becomes complete or is found damaged.

checkpoints/step-00000050/              complete: a folder of this name appears by a rename, with everything in it
    manifest.json                       size and checksum of every other file, and of itself
    .metadata  __<rank>_<n>.distcp      weights, masks, moments (torch.distributed.checkpoint)
    state.pt   rank-<rank>.pt           what else the next step depends on: of the run, and of each rank
checkpoints/step-00000050.2/            the same step, saved again
checkpoints/step-00000100.tmp-1f0c…/    being written, or left by a save that died; cleared by the next save
"""

import errno
import json
import os
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.errors import CheckpointError

FORMAT = 1
"""Version of everything described here and of the names inside the tensors' files."""
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.pt"

_COMPLETE = re.compile(r"^step-(\d{8,})(?:\.(\d+))?$")
_UNFINISHED = re.compile(r"^step-\d{8,}(?:\.\d+)?\.tmp-[0-9a-f]+$")
_CHUNK_BYTES = 1 << 20


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are not what was written."""


def rank_file(rank: int) -> str:
    """Name of the file that holds what belongs to one rank alone."""
    return f"rank-{rank:05d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest step first; empty where there are none, or no folder."""
    if not folder.is_dir():
        return []
    found = [
        ((int(match[1]), int(match[2] or 1)), path)
        for path in folder.iterdir()
        if (match := _COMPLETE.match(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def checkpoints_in(path: Path) -> list[Path]:
    """The complete checkpoints that `path` stands for, oldest first: itself, a folder of them, or a run folder's.

    Raises:
        CheckpointError: There are none.
    """
    if (path / MANIFEST_FILE).is_file() or _COMPLETE.match(path.name):
        return [path]
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        what = "holds no checkpoint" if path.is_dir() else "no such run folder or checkpoint"
        raise CheckpointError(f"{path}: {what}")
    return found


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = _COMPLETE.match(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint}: not a checkpoint; expected a folder called step-<number>")
    return int(match[1])


def new_name(folder: Path, step: int) -> str:
    """Name for a checkpoint of `step` that takes none away that is there."""
    attempts = [
        int(match[2] or 1)
        for path in list_checkpoints(folder)
        if (match := _COMPLETE.match(path.name)) and int(match[1]) == step
    ]
    return f"step-{step:08d}" + (f".{max(attempts) + 1}" if attempts else "")


def unfinished(folder: Path) -> list[Path]:
    """What saves that died have left."""
    return [path for path in folder.iterdir() if _UNFINISHED.match(path.name)]


def remove_replaced(folder: Path, newest: Path, keep: int) -> None:
    """Delete what a complete and durable `newest` replaces: all but the `keep` last up to it, and all of later steps.

    Later steps belong to a past that the run has left when it went on from an earlier checkpoint. What cannot be
    deleted is warned about, and the next save tries again.
    """
    checkpoints = list_checkpoints(folder)
    position = checkpoints.index(newest)
    earlier = [path for path in checkpoints[:position] if step_of(path) < step_of(newest)]
    kept = [*earlier[len(earlier) - min(keep - 1, len(earlier)) :], newest]
    for path in checkpoints:
        if path not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # Renamed first: nobody may take what is half deleted for a checkpoint.
    unwanted = checkpoint.with_name(f"{checkpoint.name}.tmp-{secrets.token_hex(4)}")
    try:
        checkpoint.rename(unwanted)
        shutil.rmtree(unwanted)
    except OSError as error:
        warnings.warn(f"{checkpoint}: an old checkpoint could not be deleted: {error}", stacklevel=2)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about a file."""

    num_bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read a file and describe it; CRC-32 finds every flipped bit and runs at several GB/s.

        Raises:
            OSError: It cannot be read.
        """
        checksum = num_bytes = 0
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(_CHUNK_BYTES))
            while count := file.readinto(buffer):
                checksum = zlib.crc32(buffer[:count], checksum)
                num_bytes += count
        return cls(num_bytes, checksum)


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of."""

    step: int
    world_size: int
    """Ranks that saved it; any number can load it."""
    files: Mapping[str, FileRecord]

    def write(self, checkpoint: Path) -> None:
        """Write manifest.json, durably.

        Raises:
            OSError: The disk is full or not writable.
        """
        content: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "files": {
                name: {"bytes": record.num_bytes, "crc32": f"{record.crc32:08x}"}
                for name, record in sorted(self.files.items())
            },
        }
        content["crc32"] = _checksum_of_content(content)
        write_durably(checkpoint / MANIFEST_FILE, json.dumps(content, indent=1).encode() + b"\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """Read manifest.json.

        Raises:
            DamagedCheckpointError: It is missing, cut short or changed.
            CheckpointError: There is no such checkpoint, or it was written by a version with another format.
        """
        path = checkpoint / MANIFEST_FILE
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint}: no such checkpoint")
        try:
            content = json.loads(path.read_bytes())
            if content.pop("crc32") != _checksum_of_content(content):
                raise ValueError("its checksum does not match")
            if content["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {content['format']}, and this version reads format {FORMAT}")
            files = {
                name: FileRecord(record["bytes"], int(record["crc32"], 16)) for name, record in content["files"].items()
            }
            return cls(content["step"], content["world_size"], files)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path}: missing, so the checkpoint is not complete") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{path}: damaged ({error})") from None


def verify_files(checkpoint: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare files with what the manifest says about them.

    Raises:
        DamagedCheckpointError: One is missing, cut short or changed; the message names it.
    """
    for name, expected in files.items():
        path = checkpoint / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected.num_bytes:
                raise DamagedCheckpointError(f"{path}: damaged: {num_bytes} bytes instead of {expected.num_bytes}")
            if FileRecord.of(path).crc32 != expected.crc32:
                raise DamagedCheckpointError(f"{path}: damaged: its checksum does not match the manifest")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path}: missing") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def verify_checkpoint(checkpoint: Path) -> None:
    """Read a whole checkpoint and compare it with its manifest.

    Raises:
        CheckpointError: It is not there, not complete, or damaged; the message names the file.
    """
    verify_files(checkpoint, Manifest.read(checkpoint).files)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it.

    Raises:
        OSError: The disk is full or not writable.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's list of names.

    Raises:
        OSError: The disk does not answer.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a failed write inside into a CheckpointError that says where, why, and what to do."""
    try:
        yield
    except Exception as error:
        cause = _os_error_behind(error)
        if cause is None:
            raise
        raise CheckpointError(
            f"{folder}: the checkpoint could not be saved: {cause.strerror or cause}. {_advice(cause)} "
            "Earlier checkpoints are untouched"
        ) from error


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """torch's file writer wraps what the operating system said: look behind it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space on that disk, lower checkpoint.keep, or set output to a folder on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make the folder writable or set output to one that is."
    return "Set output to a folder on a working disk."


def _checksum_of_content(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"

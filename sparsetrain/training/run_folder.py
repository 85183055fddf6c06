"""The run folder: whose it is, what is in it, and who may write to it.

    config.yaml       the whole config, defaults included; by its first line a folder is known to be a run's
    data.json         what text the run is trained on: versions, content hashes, documents
    tokenizer.json    the tokenizer
    metrics.jsonl  evals.jsonl  tensorboard/        written by metrics.MetricsWriter
    checkpoints/      written by sparsetrain.checkpoint
    expert_load.npz   of a model with experts: the load of each in every step
    attention_layouts.png                           of a model with sparse attention: the blocks that heads see
    summary.json      once the run is done;  loss.png  expert_load.png  profile/  logs/ of workers

Nothing else in the folder is ever touched, and a folder that is not a run's is refused.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sparsetrain.checkpoint import list_checkpoints, step_of
from sparsetrain.checkpoint.agreement import on_first_rank
from sparsetrain.config import RunConfig, dump_config, format_count, load_config
from sparsetrain.data import Dataset
from sparsetrain.errors import ConfigError, RunFolderError
from sparsetrain.parallel import World
from sparsetrain.planning.flops import ParameterCount
from sparsetrain.training.config_changes import config_changes
from sparsetrain.training.expert_trace import TRACE_FILE
from sparsetrain.training.folder_lock import FolderLock, is_locked
from sparsetrain.training.metrics import EVALS_FILE, METRICS_FILE, TENSORBOARD_FOLDER, Row, read_metrics, replace_file
from sparsetrain.training.state import RunState
from sparsetrain.training.summarize import summarize
from sparsetrain.training.summary import SUMMARY_FILE

OnExisting = Literal["refuse", "resume", "overwrite"]

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "data.json"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS_FOLDER = "checkpoints"
LOGS_FOLDER = "logs"
ATTENTION_PLOT_FILE = "attention_layouts.png"

_HEADER = "# sparsetrain run: the config as it was used, defaults included\n"
_RESULTS = (
    METRICS_FILE,
    EVALS_FILE,
    SUMMARY_FILE,
    PROVENANCE_FILE,
    TOKENIZER_FILE,
    TENSORBOARD_FOLDER,
    CHECKPOINTS_FOLDER,
    LOGS_FOLDER,
    "profile",
    TRACE_FILE,
    "loss.png",
    "expert_load.png",
    ATTENTION_PLOT_FILE,
)
"""What a run writes besides its config, and all that overwriting deletes."""
_DRIVER_LOCK, _WORKER_LOCK = ".driver.lock", ".lock"
_LOCKS = (_DRIVER_LOCK, _WORKER_LOCK)
_LAST_GROUP_S = 20.0
"""How long the workers of a group that was restarted may take to end, and let go of the folder."""
_BYTES_PER_PARAMETER = 12.25
"""In a checkpoint: weight and two moments in fp32, and at most two masks of a bit."""


@dataclass
class RunFolder:
    """A run folder that this process may write to, until it is closed."""

    path: Path
    """Absolute."""
    notices: tuple[str, ...] = ()
    """What a person should know about the folder."""
    _locks: ExitStack = field(default_factory=ExitStack, repr=False)

    @classmethod
    def open(cls, config: RunConfig, on_existing: OnExisting, world: World | None) -> Self:
        """Check that `config.output` may be written to, settle what becomes of a run that is there, and lock it.

        The work is rank 0's, and its result or error everyone's. Call it once everything else about the run has been
        checked: it is here that an old run is deleted.

        Args:
            config: The run.
            on_existing: What to do about a run in the folder. refuse: it is an error, unless nothing has come of that
                run yet. resume: go on with it, if it has the same config (but for `MAY_CHANGE`); begin if there is
                none. overwrite: delete what it wrote.
            world: The ranks that train; None in a process that starts them elsewhere (a Ray driver), whose workers
                then open the same folder with on_existing="resume".

        Raises:
            RunFolderError: The folder cannot be made or written, is in use by another process, holds something other
                than a run, or a run that may not be continued or replaced.
        """
        path = Path(config.output).expanduser().absolute()
        with ExitStack() as stack:
            opened = _open_for_workers if world is None else _open_to_train
            notices = on_first_rank(lambda: opened(path, config, on_existing, stack))
            return cls(path, tuple(notices), stack.pop_all())

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS_FOLDER

    @property
    def logs(self) -> Path:
        """Folder of the workers' output."""
        return self.path / LOGS_FOLDER

    def check_space(self, num_parameters: int, keep: int) -> None:
        """Make sure that the checkpoints will fit; collective.

        Args:
            num_parameters: Of the model.
            keep: Checkpoints kept; while one is being written there is one more.

        Raises:
            RunFolderError: The disk has too little room.
        """
        on_first_rank(lambda: _check_space(self.path, num_parameters, keep))

    def describe_data(self, datasets: Sequence[Dataset]) -> None:
        """Write what text the run is trained on, and its tokenizer; collective.

        Args:
            datasets: By phase.

        Raises:
            RunFolderError: A resumed run would go on with another text, or the disk is full.
        """
        on_first_rank(lambda: _describe_data(self.path, datasets))

    def finish(
        self,
        config: RunConfig,
        state: RunState,
        *,
        parameters: ParameterCount,
        peak_flops: float,
        sample: str | None,
    ) -> dict[str, Any]:
        """Work out the figures of a finished run and write summary.json; collective. Arguments as for `summarize`.

        Returns:
            What summary.json holds.

        Raises:
            RunFolderError: The disk is full or no longer writable, or metrics.jsonl is damaged.
        """

        def write() -> dict[str, Any]:
            rows = read_metrics(self.path)
            summary = summarize(config, state, rows, parameters=parameters, peak_flops=peak_flops, sample=sample)
            summary.save(self.path)
            return summary.to_json()

        return on_first_rank(write)

    def close(self) -> None:
        """Let other processes write to the folder; harmless a second time."""
        self._locks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_to_train(path: Path, config: RunConfig, on_existing: OnExisting, locks: ExitStack) -> list[str]:
    with _usable(path):
        _make(path)
        # Workers of a driver may have to wait until those of the group before them are gone.
        wait_s = _LAST_GROUP_S if is_locked(path / _DRIVER_LOCK) else 0.0
        lock = locks.enter_context(FolderLock(path / _WORKER_LOCK, wait_s=wait_s))
        return _settle(path, config, on_existing) + _lock_notices(lock)


def _open_for_workers(path: Path, config: RunConfig, on_existing: OnExisting, locks: ExitStack) -> list[str]:
    with _usable(path):
        _make(path)
        lock = locks.enter_context(FolderLock(path / _DRIVER_LOCK))
        with FolderLock(path / _WORKER_LOCK):
            notices = _settle(path, config, on_existing) + _lock_notices(lock)
        (path / LOGS_FOLDER).mkdir(exist_ok=True)
        return notices


def _make(path: Path) -> None:
    """Make the folder, or refuse one that holds something other than a run."""
    path.mkdir(parents=True, exist_ok=True)
    names = sorted(item.name for item in path.iterdir() if item.name not in _LOCKS)
    if names and not _is_run(path):
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise RunFolderError(
            f"output={path} is not empty and not a run folder (it holds {shown}): nothing there was touched. "
            "Set output to a new folder"
        )


def _is_run(path: Path) -> bool:
    config = path / CONFIG_FILE
    return config.is_file() and config.read_bytes().startswith(_HEADER.encode())


def _lock_notices(lock: FolderLock) -> list[str]:
    return [] if lock.supported else [f"{lock.path.parent}: this file system has no locks; start no second run there"]


def _settle(path: Path, config: RunConfig, on_existing: OnExisting) -> list[str]:
    """Decide about the run in the folder, if any, and leave the folder as the coming run needs it."""
    if not _is_run(path):
        _write_config(path, config)
        return []
    if on_existing == "resume":
        return _take_over(path, config)
    if on_existing == "refuse" and (progress := _progress(path)):
        raise RunFolderError(
            f"{path} already holds a run: {progress}. Continue it with --resume, delete it with --overwrite, or set "
            "output to another folder"
        )
    _delete_results(path)
    _write_config(path, config)
    return []


def _progress(path: Path) -> str:
    """How far the run in the folder has come, in words; empty if nothing has come of it yet."""
    facts = []
    if row := _last_row(path):
        facts.append(f"step {row['step']}")
        if row.get("tokens") is not None:
            facts.append(f"{format_count(row['tokens'])} tokens")
        if row.get("loss") is not None:
            facts.append(f"loss {row['loss']:.4g}")
        facts.append(f"last written {datetime.fromtimestamp((path / METRICS_FILE).stat().st_mtime):%Y-%m-%d %H:%M}")
    checkpoints = list_checkpoints(path / CHECKPOINTS_FOLDER)
    if checkpoints:
        facts.append(f"newest checkpoint at step {step_of(checkpoints[-1])}")
    elif facts:
        facts.append("no checkpoint")
    return ", ".join(facts)


def _last_row(path: Path) -> Row | None:
    try:
        rows = read_metrics(path)
    except RunFolderError:  # damaged, which is no reason to take the run for nothing
        return {"step": "unknown"}
    return rows[-1] if rows else None


def _take_over(path: Path, config: RunConfig) -> list[str]:
    """Go on with a run of the same config; returns what has changed in how it is computed."""
    try:
        before = load_config(path / CONFIG_FILE, was_trained=True)
    except ConfigError as error:
        raise RunFolderError(
            f"{path} cannot be resumed, because the config it was started with cannot be read:\n{error}\n"
            "Delete the run with --overwrite, or set output to another folder"
        ) from None
    changes = config_changes(before, config)
    forbidden = [f"  {change}" for change in changes if not change.allowed]
    if forbidden:
        raise RunFolderError(
            f"{path} holds a run of another config, so it cannot be resumed with this one:\n"
            + "\n".join(forbidden)
            + "\nGo on with the config that it was started with, delete the run with --overwrite, or set output to "
            "another folder (train.init_from can start there from this run's weights)"
        )
    if changes:
        _write_config(path, config)
    return [f"resumed with another {change.key}: {change.now}, before {change.before}" for change in changes]


def _write_config(path: Path, config: RunConfig) -> None:
    replace_file(path / CONFIG_FILE, (_HEADER + dump_config(config)).encode())


def _delete_results(path: Path) -> None:
    """Delete what a run writes, and nothing else. The config stays until it is replaced: the folder remains a run's."""
    for name in _RESULTS:
        item = path / name
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)


def _check_space(path: Path, num_parameters: int, keep: int) -> None:
    with _usable(path):
        each = int(num_parameters * _BYTES_PER_PARAMETER)
        there = sum(
            file.stat().st_size
            for checkpoint in list_checkpoints(path / CHECKPOINTS_FOLDER)
            for file in checkpoint.iterdir()
        )
        needed, free = max(each, (keep + 1) * each - there), shutil.disk_usage(path).free
    if free < needed:
        raise RunFolderError(
            f"output={path}: {_gigabytes(free)} are free on its disk, and checkpoint.keep={keep} needs room for "
            f"{keep + 1} checkpoints of {_gigabytes(each)}: {_gigabytes(needed)} more. Free space, lower "
            "checkpoint.keep, or set output to a folder on another disk"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _describe_data(path: Path, datasets: Sequence[Dataset]) -> None:
    phases = json.loads(json.dumps([dataset.provenance for dataset in datasets]))
    file = path / PROVENANCE_FILE
    with _usable(path):
        if file.is_file() and list_checkpoints(path / CHECKPOINTS_FOLDER):
            _check_same_text(file, phases)
        replace_file(file, (json.dumps(phases, indent=2, ensure_ascii=False) + "\n").encode())
        tokenizer = json.dumps(datasets[0].tokenizer.to_json(), ensure_ascii=False)
        replace_file(path / TOKENIZER_FILE, tokenizer.encode())


def _check_same_text(file: Path, phases: list[Any]) -> None:
    try:
        before = json.loads(file.read_bytes())
    except ValueError as error:
        raise RunFolderError(f"{file}: damaged ({error}); remove it to go on without comparing the text") from None
    for index, (old, new) in enumerate(zip(before, phases, strict=True)):
        for label, was, now in _text_differences(old, new):
            raise RunFolderError(
                f"{file.parent}: the text of phase {index + 1} ({label}) is not what the run was started with: "
                f"{was} there, {now} now. A resumed run needs the same text; restore it or start a new run"
            )


def _text_differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Differences in what a text says; what it is called and where it came from may change."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys():
            if name not in ("label", "version", "name"):
                yield from _text_differences(before.get(name), now.get(name), name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            yield from _text_differences(old, new, key)
    elif before != now:
        yield key, before, now


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn what the operating system says about the folder into a message with the fix."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"output={path} cannot be used: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename and str(error.filename) != str(path) else "")
            + ". Make it writable, free space on its disk, or set output to another folder"
        ) from error

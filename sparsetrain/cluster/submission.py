"""Hand a run to a Ray cluster as a job, and follow its output."""

import asyncio
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from ray.job_submission import JobStatus

from sparsetrain.cluster.event_lines import EventLineReader
from sparsetrain.cluster.job_server import JobServer
from sparsetrain.cluster.packages import find_packages
from sparsetrain.cluster.paths import absolute_paths
from sparsetrain.cluster.resources import Request
from sparsetrain.config import RunConfig, dump_config, load_config
from sparsetrain.errors import ClusterError
from sparsetrain.training.events import Reporter

if TYPE_CHECKING:
    from sparsetrain.training.run_folder import OnExisting  # it needs torch, which takes seconds to import

_MAX_UPLOAD_BYTES = 100 * 2**20
"""What Ray's job server takes in one package."""
_MAX_FILES_NAMED = 5
_POLL_S = 0.5
_SILENCE_S = 20.0
_EXCLUDED = ("**/__pycache__", "**/.*_cache")


def submit(
    config: RunConfig | str | Path,
    *,
    address: str = "auto",
    overrides: Sequence[str] = (),
    detach: bool = False,
    on_existing: "OnExisting" = "refuse",
    reporter: Reporter | None = None,
    write: Callable[[str], None] | None = None,
) -> str:
    """Submit a run as a Ray job. The YAML and both packages travel with it; the cluster needs their dependencies.

    Relative paths of the config stay relative to the submitter's current directory, so the cluster must share its
    filesystem or the paths must be absolute ones of the cluster.

    Args:
        config: The run, or its YAML file.
        address: The job server: http://host:8265 or host:8265; "auto": $RAY_API_SERVER_ADDRESS, else this machine.
        overrides: `key=value` each, when `config` is a file.
        detach: Return as soon as the cluster has the job, instead of following its output to the end.
        on_existing: What to do about a run that `output` holds already.
        reporter: Called with the run's events as they arrive, a few steps of a second at most. With one, the job's
            log holds events as JSON; `follow_job` makes them legible again.
        write: Takes the job's other output, a line at a time; default standard output.

    Returns:
        The job's id.

    Raises:
        ConfigError: The YAML or an override is wrong.
        ClusterError: The job server cannot be reached, the upload or the run is too large, or the job did not succeed.
    """
    run = config if isinstance(config, RunConfig) else load_config(config, overrides)
    write = write or _write
    server = JobServer(address)
    server.check_room(Request.from_config(run.cluster).least)
    flags = {"refuse": [], "resume": ["--resume"], "overwrite": ["--overwrite"]}[on_existing]
    flags += ["--event-lines"] if reporter is not None else []
    run = absolute_paths(run, Path.cwd())
    with uploaded_files({f"{run.name}.yaml": dump_config(run)}) as runtime_env:
        job = server.submit(
            shlex.join(["python", "-m", "sparsetrain", "train", f"{run.name}.yaml", *flags]),
            runtime_env,
            name=run.name,
            metadata={"output": run.output},
        )
    if not detach:
        write(f"submitted as {job}; Ctrl-C leaves it running")
        follow_job(server, job, reporter=reporter, write=write)
    return job


def submit_checkup(address: str, *, write: Callable[[str], None] | None = None) -> None:
    """Look at all nodes of a cluster from outside, as a job there.

    Args:
        address: The job server, as for `submit`.
        write: Takes what the job prints, a line at a time; default standard output.

    Raises:
        ClusterError: The job server cannot be reached, or a node has a problem.
    """
    server = JobServer(address)
    with uploaded_files({"README": "A checkup of all nodes.\n"}) as runtime_env:
        job = server.submit("python -m sparsetrain doctor --cluster", runtime_env, name="doctor", metadata={})
    follow_job(server, job, write=write)


@contextmanager
def uploaded_files(texts: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The runtime environment of a job that both packages and some files travel with, while it is being submitted.

    Args:
        texts: File name to content; the job's working directory holds them.

    Raises:
        ClusterError: A package is larger than Ray takes.
    """
    packages = find_packages()
    check_upload_size([packages.library, packages.kernels])
    with tempfile.TemporaryDirectory(prefix="sparsetrain-submit-") as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text)
        yield {
            "working_dir": folder,
            "py_modules": [str(packages.library), str(packages.kernels)],
            "excludes": list(_EXCLUDED),
        }


def check_upload_size(roots: Sequence[Path], *, limit: int = _MAX_UPLOAD_BYTES) -> None:
    """Refuse a package folder that Ray would refuse after uploading it.

    Raises:
        ClusterError: A folder is larger than `limit` bytes; the message names its largest files.
    """
    for root in roots:
        sizes = {
            path: path.stat().st_size
            for path in root.rglob("*")
            if path.is_file() and not any(_is_excluded(part) for part in path.relative_to(root).parts)
        }
        if sum(sizes.values()) > limit:
            largest = sorted(sizes, key=lambda path: -sizes[path])[:_MAX_FILES_NAMED]
            lines = [f"  {sizes[path] / 2**20:.1f} MiB  {path}" for path in largest]
            raise ClusterError(
                f"{root} has {sum(sizes.values()) / 2**20:.0f} MiB, and Ray uploads at most {limit / 2**20:g} MiB. "
                "Move what does not belong to the package out of it; the largest files:\n" + "\n".join(lines)
            )


def follow_job(
    server: JobServer, job: str, *, reporter: Reporter | None = None, write: Callable[[str], None] | None = None
) -> None:
    """Pass on a job's output from its beginning until the job ends.

    Args:
        server: Where the job is.
        job: Its id.
        reporter: Called with the run's events, where the job's log holds them.
        write: Takes the other lines, without their newline; default standard output.

    Raises:
        ClusterError: There is no such job, it did not succeed, or the job server went away.
    """
    write = write or _write
    reader = EventLineReader()

    def take(lines: Iterator[Any]) -> None:
        for line in lines:
            if isinstance(line, str):
                write(line)
            elif reporter is not None:
                reporter(line)

    server.details(job)
    try:
        asyncio.run(_tail(server, job, lambda piece: take(reader.feed(piece))))
    except KeyboardInterrupt:
        where = f"--address {server.address} {job}"
        write(f"\n{job} goes on. Follow it: sparsetrain jobs logs {where}\nStop it: sparsetrain jobs stop {where}")
        raise
    take(reader.end())
    if (ended := server.details(job)).status != JobStatus.SUCCEEDED:
        raise ClusterError(_failure(job, ended))


def print_log(server: JobServer, job: str, *, reporter: Reporter, write: Callable[[str], None]) -> None:
    """Pass on a job's output as far as it has come; arguments as for `follow_job`."""
    reader = EventLineReader()
    for line in [*reader.feed(server.log(job)), *reader.end()]:
        if isinstance(line, str):
            write(line)
        else:
            reporter(line)


def _failure(job: str, ended: Any) -> str:
    how = str(ended.status).lower()
    if ended.driver_exit_code is None and ended.message and ended.status == JobStatus.FAILED:
        return f"job {job} {how} before it ran: {ended.message}"
    return f"job {job} {how}; its last lines above say why" if ended.status == JobStatus.FAILED else f"job {job} {how}"


async def _tail(server: JobServer, job: str, write: Callable[[str], None]) -> None:
    """The connection may break off before the job ends: then take up its output again where it stopped."""
    written = 0
    while True:
        seen = 0
        with suppress(RuntimeError, OSError, aiohttp.ClientError):
            async for piece in _pieces(server, job):
                fresh = piece[max(0, written - seen) :]
                seen += len(piece)
                written = max(written, seen)
                if fresh:
                    write(fresh)
        if server.details(job).status.is_terminal():
            return
        await asyncio.sleep(_POLL_S)


async def _pieces(server: JobServer, job: str) -> AsyncIterator[str]:
    """A job's output as it comes. After a silence the job server has to answer: a broken line may be silent, too.

    Raises:
        ClusterError: The job server went away without a word.
    """
    pieces = server.client.tail_job_logs(job)
    while True:
        awaited = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait({awaited}, timeout=_SILENCE_S))[0]:
                server.details(job)
        finally:
            awaited.cancel()
        if (piece := awaited.result()) is None:
            return
        yield piece


def _is_excluded(part: str) -> bool:
    return part == "__pycache__" or (part.startswith(".") and part.endswith("_cache"))


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

"""A connection to Ray for the length of one run: a private Ray on this machine, or a cluster that is already there."""

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import ray  # isort: skip  # it has psutil in a folder of its own, and adds that to the path
import psutil  # isort: skip

from sparsetrain.cluster.head import AUTO, LOCAL, first_line
from sparsetrain.cluster.paths import in_ray_job
from sparsetrain.cluster.resources import Request
from sparsetrain.errors import ClusterError

_END_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 128 * 2**20
"""Tensors never go through Ray's object store; without this it would claim 30 % of the memory."""
FRUGAL = {
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,
    "enable_metrics_collection": False,
    "metrics_report_interval_ms": 600_000,
    "task_events_report_interval_ms": 0,
    "event_stats": False,
}
"""Statistics that nobody reads, and processes that nobody uses: on two cores they take 3 % of them from the workers."""
_LONGEST_TEMP_FOLDER = 40
"""Ray appends about 60 characters for its sockets, and a unix socket's path may have 107."""


def resolve_address(argument: str | None, configured: str, environ: Mapping[str, str] = os.environ) -> str:
    """Decide where to run: `local`, `auto` or host:port.

    In this order: `--address`; inside a Ray job that job's cluster; `cluster.address`; RAY_ADDRESS; this machine.

    Raises:
        ClusterError: The address is of a kind that training cannot use.
    """
    from_environment = environ.get("RAY_ADDRESS")
    joined = (from_environment or AUTO) if in_ray_job(environ) else None
    address = argument or joined or (configured if configured != LOCAL else None) or from_environment or LOCAL
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is a job server: use `sparsetrain submit CONFIG --address {address}`, or give `train` the "
            "host:port of a Ray cluster that this machine belongs to."
        )
    if "://" in address:
        raise ClusterError(
            f"{address}: Ray Client addresses are not supported. Use `sparsetrain submit` with the job server's "
            "address (http://host:8265), or run `train` on a machine of the cluster with host:port."
        )
    return address


@contextlib.contextmanager
def ray_session(address: str, request: Request, *, env_vars: Mapping[str, str]) -> Iterator[None]:
    """Start a local Ray or join a cluster; on leaving, end exactly what was started, or just disconnect.

    Args:
        address: As `resolve_address` returns it.
        request: Sizes a local Ray.
        env_vars: Environment of all processes that Ray starts for this run.

    Raises:
        ClusterError: Ray cannot be started or reached.
    """
    if ray.is_initialized():
        raise ClusterError("this process is connected to Ray already: call ray.shutdown() first.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment({"RAY_USAGE_STATS_ENABLED": "0"}))
        exit_on_sigterm = stack.enter_context(_own_sigterm())
        stack.enter_context(_quiet())
        if address == LOCAL:
            stack.enter_context(_local_ray(request, env_vars))
        else:
            _join(address, env_vars)
            stack.callback(ray.shutdown)
        exit_on_sigterm()
        yield


@contextlib.contextmanager
def environment(variables: Mapping[str, str], *, also_remove: Iterable[str] = ()) -> Iterator[None]:
    """Set environment variables that are not set already, and remove them again.

    Args:
        variables: Name to value.
        also_remove: Names that somebody may set meanwhile, to be removed as well unless they are set now.
    """
    added = {name: value for name, value in variables.items() if name not in os.environ}
    to_remove = [*added, *(name for name in also_remove if name not in os.environ)]
    os.environ.update(added)
    try:
        yield
    finally:
        for name in to_remove:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _local_ray(request: Request, env_vars: Mapping[str, str]) -> Iterator[None]:
    """A Ray of our own: private folder, free ports, a secret token, no dashboard."""
    before = set(psutil.Process().children())
    folder = _temp_folder()
    try:
        with environment({"RAY_AUTH_TOKEN": _token()}, also_remove=("RAY_AUTH_MODE",)):
            try:
                _init(
                    env_vars,
                    address=LOCAL,
                    num_cpus=request.num_cpus,
                    num_gpus=request.num_gpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=str(folder),
                    _system_config=FRUGAL,
                )
            except Exception as error:
                raise ClusterError(
                    f"Ray did not start on this machine: {first_line(error)}. Train without it: --in-process."
                ) from error
            yield
    finally:
        with _uninterrupted():
            started = _with_descendants(set(psutil.Process().children()) - before)
            ray.shutdown()
            _end(started)
            shutil.rmtree(folder, ignore_errors=True)


def _join(address: str, env_vars: Mapping[str, str]) -> None:
    try:
        _init(env_vars, address=address)
    except Exception as error:
        ray.shutdown()
        if "Version mismatch" in str(error):
            raise ClusterError(
                f"{str(error).strip()}\nInstall the cluster's versions of Ray and Python here."
            ) from error
        raise ClusterError(
            f"cannot join the Ray cluster at {address}: {first_line(error)}. Is it running, and does this machine "
            "belong to it? From any other machine, use `sparsetrain submit` with the job server's address."
        ) from error


def _init(env_vars: Mapping[str, str], **arguments: object) -> None:
    ray.init(
        runtime_env={"env_vars": dict(env_vars)},
        log_to_driver=False,
        logging_level="ERROR",
        **arguments,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing a paragraph about every worker that dies, which `log_to_driver=False` does not stop.

    It is the switch that Ray's own debugger uses; there is no public one.
    """
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray._private.worker._worker_logs_enabled = True


@cache
def _token() -> str:
    """Secret that keeps other users of the machine out. Ray reads it once a process, so it is made once; without it Ray
    would leave one in the home folder."""
    return secrets.token_hex(32)


def _temp_folder() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="sparsetrain-", dir=parent if len(parent) <= _LONGEST_TEMP_FOLDER else "/tmp"))


def _with_descendants(processes: set[psutil.Process]) -> list[psutil.Process]:
    found = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    return found


def _end(processes: list[psutil.Process]) -> None:
    """Wait for processes that were told to end, and kill those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=_END_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_END_TIMEOUT_S)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[Callable[[], object]]:
    """Restore the handler of SIGTERM afterwards; yields what replaces Ray's own by an orderly exit meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield partial(signal.signal, signal.SIGTERM, _exit_on_sigterm)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_on_sigterm(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep a second Ctrl-C from leaving processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Train on Ray: start or join a cluster, hand `train` to Ray Train's workers, pass on events, explain failures."""

import contextlib
import secrets
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from sparsetrain.checkpoint import latest_checkpoint, step_of
from sparsetrain.cluster.events import start_hub, take_events
from sparsetrain.cluster.failures import (
    FailurePolicy,
    GroupFailed,
    RestartUseless,
    describe,
    essence,
    restart_notice,
    summary,
)
from sparsetrain.cluster.head import LOCAL, check_head
from sparsetrain.cluster.packages import find_packages
from sparsetrain.cluster.paths import absolute_paths, in_ray_job, job_output_root
from sparsetrain.cluster.rendezvous import Rendezvous
from sparsetrain.cluster.resources import Request, check_machine, count_nodes_anew, wait_for_cluster
from sparsetrain.cluster.session import environment, ray_session, resolve_address
from sparsetrain.cluster.worker import WorkerTask, run_worker
from sparsetrain.config import RunConfig
from sparsetrain.errors import ClusterError, SparsetrainError
from sparsetrain.training import preflight
from sparsetrain.training.events import DataProgress, Notice, Reporter
from sparsetrain.training.run_folder import OnExisting, RunFolder

_POLL_S = 1.0
_RAY_FOLDER = "ray-train"
"""Ray Train insists on a folder of its own, and leaves nothing of use in it."""
_CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # Ray's default of 600 s hides a stuck worker for ten minutes
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every line of a worker twice
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_RESIZE_EVERY_S = 300.0
"""How often an elastic run looks whether more workers fit: they cost it the steps since its last checkpoint."""
_ELASTIC_START_TIMEOUT_S = 15.0
_ELASTIC_STARTS_A_RESTART = 8
"""Ray counts a node among those that workers fit on for up to a minute after it has gone: an elastic run does not wait
for that node long, and asks again, and such waits are no restarts of the person's."""
_PROCESS_ENVIRONMENT = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1"}
"""A group that has lost a rank never shuts down in order; Ray's default is to wait for that for 30 s."""


def run_on_ray(
    config: RunConfig,
    *,
    address: str | None = None,
    on_existing: OnExisting = "refuse",
    reporter: Reporter | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Train on Ray workers and wait for the end.

    A group in which a worker dies is restarted, at most `cluster.max_restarts` times, and resumes from the last
    checkpoint. An error that is the user's to mend ends the run at once.

    Args:
        config: The run. Relative paths are relative to the current directory; inside a Ray job a relative output goes
            to $SPARSETRAIN_OUTPUT_ROOT, default ~/sparsetrain.
        address: host:port of a cluster, "auto", or "local"; default `cluster.address`, then RAY_ADDRESS. Inside a Ray
            job: that job's cluster.
        on_existing: What to do about a run that `output` holds already.
        reporter: Called in this thread with every event of the run.
        profile: Write a torch.profiler trace of a few steps.

    Returns:
        What summary.json holds.

    Raises:
        ClusterError: Ray cannot be had, has too little room, or the workers failed too often.
        SparsetrainError: Whatever else is the user's to mend, as the workers raised it.
    """
    report = reporter or (lambda _: None)
    address = resolve_address(address, config.cluster.address)
    request = Request.from_config(config.cluster)
    if address == LOCAL:
        check_machine(request)
    check_head(address)
    config = _with_absolute_paths(config, report)
    preflight(config, on_progress=lambda stage, done, total: report(DataProgress(stage, done, total)))
    with contextlib.ExitStack() as stack:
        if on_existing != "overwrite":
            folder = stack.enter_context(RunFolder.open(config, on_existing, None))
        report(Notice(_starting(request, address)))
        stack.enter_context(environment(_driver_environment(config, address)))
        stack.enter_context(ray_session(address, request, env_vars=_PROCESS_ENVIRONMENT))
        if address != LOCAL:
            timeout_s = config.cluster.start_timeout_s
            wait_for_cluster(request.least, timeout_s=timeout_s, notify=lambda message: report(Notice(message)))
        is_elastic = request.min_workers is not None and address != LOCAL
        if is_elastic:
            count_nodes_anew()
        if on_existing == "overwrite":  # the old run is deleted only now that everything else is there
            folder = stack.enter_context(RunFolder.open(config, on_existing, None))
        for notice in folder.notices:
            report(Notice(notice))
        marker = stack.enter_context(_marker(folder.logs))
        return _Run(config, folder, request, report, is_elastic).train(marker, profile)


class _Run:
    """One run on a connected cluster: the thread that waits for Ray Train, and the loop that passes on events."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, request: Request, report: Reporter, is_elastic: bool
    ) -> None:
        self._config = config
        self._folder = folder
        self._request = request
        self._report = report
        self._is_elastic = is_elastic
        self._hub = start_hub()
        self._restarts = 0

    def train(self, marker: Path, profile: bool) -> dict[str, Any]:
        """Start the workers, pass on events until they are done, and return rank 0's summary."""
        task = WorkerTask(
            config=self._config,
            profile=profile,
            hub=self._hub,
            driver_packages=find_packages(),
            log_folder=self._folder.logs,
            marker=marker,
            num_threads=self._num_threads,
        )
        fit = _Fit(self._trainer(task))
        fit.start()
        while fit.is_alive():
            self._pass_on(_POLL_S)
        self._pass_on(0)
        try:
            return fit.result()
        except (TrainingFailedError, RayError) as error:
            raise self._explain(error) from None

    def _trainer(self, task: WorkerTask) -> TorchTrainer:
        cluster = self._config.cluster
        return _Trainer(
            partial(run_worker, task),
            torch_config=Rendezvous(timeout_s=int(cluster.collective_timeout_s), hub=self._hub),
            scaling_config=ScalingConfig(
                num_workers=(cluster.min_workers, cluster.workers) if self._is_elastic else cluster.workers,
                elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=self._request.per_worker,
            ),
            run_config=RayRunConfig(
                name=_RAY_FOLDER,
                storage_path=str(task.log_folder),
                failure_config=FailureConfig(
                    max_failures=cluster.max_restarts,
                    controller_failure_limit=cluster.max_restarts
                    + (_ELASTIC_STARTS_A_RESTART * (1 + cluster.max_restarts) if self._is_elastic else 0),
                ),
                callbacks=[FailurePolicy(self._hub, is_elastic=self._is_elastic)],
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._num_threads)}},
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )

    @property
    def _num_threads(self) -> int:
        return max(1, int(self._config.cluster.cpus_per_worker))

    def _pass_on(self, timeout_s: float) -> None:
        for event in take_events(self._hub, timeout_s):
            if isinstance(event, GroupFailed):
                self._tell_restart(event)
            else:
                self._report(event)

    def _tell_restart(self, failed: GroupFailed) -> None:
        """Announce a restart; the last failure of too many is told by the error instead."""
        self._restarts += 1
        if self._restarts <= self._config.cluster.max_restarts:
            message = restart_notice(
                failed,
                restarts=self._restarts,
                max_restarts=self._config.cluster.max_restarts,
                last_step=self._last_step(),
            )
            self._report(Notice(message, level="warning"))

    def _explain(self, error: Exception) -> SparsetrainError:
        """Turn what Ray Train raised into one message for people."""
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        max_restarts = self._config.cluster.max_restarts
        if isinstance(cause, SparsetrainError):
            return cause
        if isinstance(cause, RestartUseless):
            return self._summary(cause.failed, f"{self._restarts} restarts; another would meet the same error")
        if isinstance(cause, WorkerGroupError):
            failed = GroupFailed({rank: describe(failure) for rank, failure in cause.worker_failures.items()})
            return self._summary(failed, f"{max_restarts} restarts (cluster.max_restarts={max_restarts})")
        return ClusterError(f"Ray Train gave up: {essence(cause)}\nfull log: {self._folder.logs}")

    def _summary(self, failed: GroupFailed, tried: str) -> ClusterError:
        step = self._last_step()
        saved = "no checkpoint was saved" if step is None else f"step {step} is saved: continue with --resume"
        return ClusterError(
            summary(
                failed,
                world_size=self._config.cluster.workers,
                tried=tried,
                log_folder=self._folder.logs,
                saved=saved,
            )
        )

    def _last_step(self) -> int | None:
        checkpoint = latest_checkpoint(self._folder.checkpoints)
        return None if checkpoint is None else step_of(checkpoint)


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray is untyped
    """TorchTrainer without two actors of 190 MB each: we feed no Ray datasets, and our placement group ends with us."""

    def _create_default_callbacks(self) -> list[Any]:
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unused]


class _Fit(threading.Thread):
    """`trainer.fit()` beside the main thread, which so stays free for events and for Ctrl-C."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._trainer = trainer
        self._summary: dict[str, Any] = {}
        self._error: BaseException | None = None

    def run(self) -> None:
        """Body of the thread."""
        try:
            self._summary = self._trainer.fit().return_value
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, Any]:
        """What rank 0 returned; raises what `fit` raised."""
        if self._error is not None:
            raise self._error
        return self._summary


def _starting(request: Request, address: str) -> str:
    count = f"{request.workers} worker{'s' * (request.workers > 1)}"
    if address == LOCAL:
        unused = (
            "" if request.min_workers is None else "; cluster.min_workers is not used there, where no nodes go or come"
        )
        return f"starting {count} on a local Ray{unused}"
    if request.min_workers is not None:
        count = f"{request.min_workers} to {count}"
    return f"starting {count} on the Ray cluster at {address}"


def _driver_environment(config: RunConfig, address: str) -> dict[str, str]:
    timeout_s = config.cluster.start_timeout_s
    if config.cluster.min_workers is not None:
        timeout_s = min(timeout_s, _ELASTIC_START_TIMEOUT_S)
    variables = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(timeout_s)}
    if address == LOCAL:
        variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody preempts a laptop; saves a process
    return {**_CONTROLLER_ENVIRONMENT, **variables}


def _with_absolute_paths(config: RunConfig, report: Reporter) -> RunConfig:
    if not in_ray_job():
        return absolute_paths(config, Path.cwd())
    absolute = absolute_paths(config, Path.cwd(), output_root=job_output_root())
    if absolute.output != config.output:
        report(
            Notice(f"output={config.output} is relative, and a Ray job's directory vanishes: using {absolute.output}")
        )
    return absolute


@contextlib.contextmanager
def _marker(logs: Path) -> Iterator[Path]:
    """A file by which workers see that they share the run folder's filesystem with the driver."""
    marker = logs / f".shared-{secrets.token_hex(8)}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)
        shutil.rmtree(logs / _RAY_FOLDER, ignore_errors=True)

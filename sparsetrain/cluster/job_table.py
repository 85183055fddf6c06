"""Jobs of a cluster, for people and for grep."""

import time
from collections.abc import Sequence
from datetime import datetime

from ray.job_submission import JobDetails
from rich.console import Console
from rich.text import Text

from sparsetrain.training.formatting import duration

_STYLES = {"RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red"}


def print_jobs(jobs: Sequence[JobDetails], console: Console) -> None:
    """Print jobs, a line each, however wide the terminal is: ids and folders are to be copied."""
    if not jobs:
        console.print("no jobs")
        return
    rows = [(Text(str(job.submission_id)), _status(job), _started(job), _took(job), _output(job)) for job in jobs]
    header = tuple(Text(name, "dim") for name in ("job", "status", "started", "took", "output"))
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        for cell, width in zip(row, widths, strict=True):
            cell.pad_right(width - len(cell))
        line = Text("  ").join(row)
        line.rstrip()
        console.print(line, soft_wrap=True)


def print_job(job: JobDetails, console: Console) -> None:
    """Print all that matters about one job."""
    rows = {
        "job": Text(str(job.submission_id)),
        "status": _status(job),
        "started": _started(job),
        "took": _took(job),
        "runs": Text(job.entrypoint),
        "output": _output(job),
        "says": Text((job.message or "").strip().partition("\n")[0]),  # Ray appends the log, which `jobs logs` shows
    }
    for name, text in rows.items():
        if text:
            console.print(Text(f"{name:<9}", "dim") + text, soft_wrap=True)


def _status(job: JobDetails) -> Text:
    status = str(job.status)
    return Text(status.lower(), _STYLES.get(status, ""))


def _started(job: JobDetails) -> Text:
    if not job.start_time:
        return Text("not yet")
    return Text(datetime.fromtimestamp(job.start_time / 1000).strftime("%Y-%m-%d %H:%M:%S"))


def _took(job: JobDetails) -> Text:
    end = job.end_time or time.time() * 1000
    return Text(duration((end - job.start_time) / 1000) if job.start_time else "")


def _output(job: JobDetails) -> Text:
    return Text((job.metadata or {}).get("output", ""))

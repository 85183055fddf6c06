import io
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from sparsetrain.cluster.job_table import print_job, print_jobs


def job(name: str, status: JobStatus, **fields: Any) -> JobDetails:
    return JobDetails(
        **{"type": JobType.SUBMISSION, "submission_id": name, "status": status, "entrypoint": "python -m x", **fields}
    )


def printed(*jobs: JobDetails, one: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=30)
    if one:
        print_job(jobs[0], console)
    else:
        print_jobs(jobs, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_jobs_are_a_line_each_in_columns_on_however_narrow_a_terminal() -> None:
    output = "/shared/" + "long/" * 20
    header, first, second = printed(
        job("run-1", JobStatus.RUNNING, start_time=1_700_000_000_000, metadata={"output": output}),
        job("a-longer-name-2", JobStatus.PENDING),
    )
    assert first.split()[:2] == ["run-1", "running"]
    assert first.endswith(output)
    assert second.split() == ["a-longer-name-2", "pending", "not", "yet"]
    assert header.index("status") == first.index("running") == second.index("pending")
    assert printed() == ["no jobs"]


def test_one_job_tells_the_first_line_of_its_message_and_how_long_it_took() -> None:
    lines = printed(
        job("run-1", JobStatus.FAILED, message="exit code 2\nlog\nlog", start_time=1_000, end_time=62_000), one=True
    )
    assert "says     exit code 2" in lines
    assert "took     1:01" in lines
    assert "status   failed" in lines
    assert not any(line.startswith("output") for line in lines)

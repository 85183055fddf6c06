from dataclasses import replace
from pathlib import Path

import pytest

from sparsetrain.cluster import packages
from sparsetrain.cluster.packages import Packages, check_same, find_packages
from sparsetrain.errors import ClusterError

UPLOADS = Path("/tmp/ray/session/runtime_resources/py_modules_files")


def test_this_process_imports_both_from_one_place() -> None:
    found = find_packages()
    assert (found.library / "errors.py").is_file()
    assert (found.kernels / "__init__.py").is_file()
    assert len(found.digest) == 64


@pytest.mark.parametrize(
    ("library", "kernels", "together"),
    [
        pytest.param("/venv/site-packages", "/venv/site-packages", True, id="installed"),
        pytest.param("/repo", "/repo/kernels", True, id="source-tree"),
        pytest.param(UPLOADS / "_ray_pkg_1", UPLOADS / "_ray_pkg_2", True, id="uploaded"),
        pytest.param("/tmp/ray/working_dir_files/_ray_pkg_1", "/venv/site-packages", False, id="working-dir-only"),
        pytest.param(UPLOADS / "_ray_pkg_1", "/venv/site-packages", False, id="one-uploaded"),
    ],
)
def test_packages_of_two_installations_are_refused(
    library: str | Path, kernels: str | Path, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = {"sparsetrain": Path(library, "sparsetrain"), "sparsetrain_kernels": Path(kernels, "sparsetrain_kernels")}
    monkeypatch.setattr(packages, "_root", roots.__getitem__)
    monkeypatch.setattr(packages, "_digest", lambda *roots: "0" * 64)
    if together:
        assert find_packages().library == roots["sparsetrain"]
        return
    with pytest.raises(ClusterError, match=r"two different installations.*runtime_env\.yaml"):
        find_packages()


def test_a_missing_package_says_how_to_ship_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"sparsetrain cannot be imported.*sparsetrain submit"):
        find_packages()


def test_other_sources_than_the_drivers_are_refused_unless_it_is_the_same_folder() -> None:
    driver = Packages("node-1", Path("/repo/sparsetrain"), Path("/repo/kernels/sparsetrain_kernels"), "a" * 64)
    check_same(replace(driver, host="node-2"), driver)
    check_same(replace(driver, digest="b" * 64), driver)
    with pytest.raises(ClusterError, match=r"other sources than the driver(.|\n)*node-2(.|\n)*node-1"):
        check_same(replace(driver, host="node-2", digest="b" * 64), driver)

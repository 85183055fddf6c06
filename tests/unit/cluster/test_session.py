import os
from unittest.mock import Mock

import pytest

from sparsetrain.cluster import session
from sparsetrain.cluster.resources import Request
from sparsetrain.cluster.session import environment, ray_session, resolve_address
from sparsetrain.errors import ClusterError

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_ADDRESS": "10.0.0.1:6379"}


@pytest.mark.parametrize(
    ("argument", "configured", "environ", "expected"),
    [
        pytest.param(None, "local", {}, "local", id="nothing-said"),
        pytest.param(None, "local", {"RAY_ADDRESS": "h:1"}, "h:1", id="environment"),
        pytest.param(None, "c:2", {"RAY_ADDRESS": "h:1"}, "c:2", id="config-before-environment"),
        pytest.param("a:3", "c:2", {"RAY_ADDRESS": "h:1"}, "a:3", id="argument-first"),
        pytest.param("local", "c:2", {"RAY_ADDRESS": "h:1"}, "local", id="local-on-purpose"),
        pytest.param(None, "local", JOB, "10.0.0.1:6379", id="job"),
        pytest.param(None, "c:2", JOB, "10.0.0.1:6379", id="job-before-config"),
        pytest.param("auto", "local", {}, "auto", id="auto"),
    ],
)
def test_where_to_run(argument: str | None, configured: str, environ: dict[str, str], expected: str) -> None:
    assert resolve_address(argument, configured, environ) == expected


@pytest.mark.parametrize(
    ("address", "hint"), [("http://h:8265", "sparsetrain submit"), ("ray://h:10001", "Ray Client")], ids=["http", "ray"]
)
def test_addresses_of_other_kinds_say_what_to_use(address: str, hint: str) -> None:
    with pytest.raises(ClusterError, match=hint):
        resolve_address(address, "local", {})


@pytest.mark.parametrize(
    ("said", "message"),
    [
        pytest.param(
            "Version mismatch: The cluster was started with:\n    Ray: 2.31.0\nThis process:\n    Ray: 2.60.0",
            r"(?s)Ray: 2.31.0.*Install the cluster's versions of Ray and Python here",
            id="another-version",
        ),
        pytest.param("no raylet\nat all", "cannot join the Ray cluster at h:1: no raylet. Is it running", id="other"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_message(
    monkeypatch: pytest.MonkeyPatch, said: str, message: str
) -> None:
    monkeypatch.setattr(session, "_init", Mock(side_effect=RuntimeError(said)))
    with pytest.raises(ClusterError, match=message), ray_session("h:1", Request(1, 1, 0), env_vars={}):
        pass


def test_the_environment_is_put_back_and_what_was_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ST_SET", "mine")
    monkeypatch.delenv("ST_NEW", raising=False)
    with environment({"ST_SET": "theirs", "ST_NEW": "1"}, also_remove=("ST_LATER",)):
        assert (os.environ["ST_SET"], os.environ["ST_NEW"]) == ("mine", "1")
        os.environ["ST_LATER"] = "by somebody"
    assert os.environ["ST_SET"] == "mine"
    assert not {"ST_NEW", "ST_LATER"} & os.environ.keys()

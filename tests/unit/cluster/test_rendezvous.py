import os

import ray  # noqa: F401  # isort: skip  # it brings psutil along
import psutil  # isort: skip
import pytest

from sparsetrain.cluster import rendezvous
from sparsetrain.cluster.rendezvous import INTERFACE_VARIABLES, Place, describe_places, interface_of, take_place
from sparsetrain.errors import ClusterError
from sparsetrain.parallel.fssdp.groups import NODE_VARIABLE


@pytest.fixture
def on_node(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*INTERFACE_VARIABLES, NODE_VARIABLE):
        monkeypatch.setenv(name, "")  # so that what `take_place` sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setattr(rendezvous.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    context = type("Context", (), {"get_node_id": lambda self: "abc"})
    monkeypatch.setattr(rendezvous.ray, "get_runtime_context", context)
    return monkeypatch


def test_a_rank_speaks_over_the_interface_that_has_its_nodes_address(on_node: pytest.MonkeyPatch) -> None:
    loopback = next(name for name, each in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in each))
    assert take_place() == Place("abc", "127.0.0.1", loopback)
    assert {os.environ[name] for name in INTERFACE_VARIABLES} == {loopback}
    assert os.environ[NODE_VARIABLE] == "abc"


def test_what_the_person_has_chosen_stays(on_node: pytest.MonkeyPatch) -> None:
    on_node.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert take_place().interface == "ib0"


def test_an_address_of_no_interface_is_refused_naming_the_node(on_node: pytest.MonkeyPatch) -> None:
    on_node.setattr(rendezvous.ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    assert interface_of("203.0.113.9") is None
    with pytest.raises(ClusterError, match=r"node 203\.0\.113\.9 .* --node-ip-address, or set GLOO_SOCKET_IFNAME"):
        take_place()


def test_places_are_told_by_node() -> None:
    places = [Place(f"n{at // 2}", f"10.0.0.{at // 2}", "ib0") for at in range(12)]
    assert describe_places(places[:3]) == "3 ranks on 2 nodes (2 on 10.0.0.0, 1 on 10.0.0.1), connected over ib0"
    assert describe_places(places).endswith("2 on 10.0.0.3 and 2 more), connected over ib0")

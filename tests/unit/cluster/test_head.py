import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from sparsetrain.cluster import head
from sparsetrain.cluster.head import check_head, check_reachable, refused_token
from sparsetrain.errors import ClusterError

TOKEN = "f" * 64


class Head(grpc.GenericRpcHandler):  # type: ignore[misc]  # untyped
    """Answers the first question of whoever has the token, and no others."""

    def service(self, details: Any) -> Any:
        if details.method != head._QUESTION:
            return None

        def answer(request: bytes, context: Any) -> bytes:
            if ("authorization", f"Bearer {TOKEN}") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def ray_head() -> Iterator[str]:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, handlers=[Head()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.fixture
def have_token(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets the token that Ray would send; Ray itself reads it once a process."""

    def have(token: str | None) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        monkeypatch.setattr(head, "get_auth_headers_if_auth_enabled", lambda user: headers)

    return have


def test_a_head_is_joined_with_its_token_and_with_no_other(
    ray_head: str, have_token: Callable[[str | None], None]
) -> None:
    have_token(TOKEN)
    check_head(ray_head)
    for token in ("0" * 64, None):
        have_token(token)
        with pytest.raises(ClusterError, match=f"^{ray_head} (asks for|refuses)"):
            check_head(ray_head)


def test_a_head_that_does_not_know_the_question_is_left_to_ray(
    ray_head: str, have_token: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    have_token(None)
    monkeypatch.setattr(head, "_QUESTION", "/ray.rpc.NodeInfoGcsService/GetClusterId2")
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(Head, "service", lambda self, details: None)
        check_head(ray_head)


def test_a_port_of_another_kind_is_refused(have_token: Callable[[str | None], None]) -> None:
    """Such as the job server's, at which Ray would wait for ever."""
    have_token(None)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"what answers at {address} is no Ray head"):
            check_head(address)


def test_a_port_that_says_nothing_is_refused(
    have_token: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    have_token(None)
    monkeypatch.setattr(head, "_ANSWER_TIMEOUT_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ClusterError, match="is no Ray head"),
    ):
        check_head(f"127.0.0.1:{silent.getsockname()[1]}")


def test_an_address_where_nobody_listens_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"nobody answers at 127.0.0.1:{port}"):
        check_reachable(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("head-node", "expected host:port", id="no-port"),
        pytest.param("127.0.0.1:99999", "nobody answers at 127.0.0.1:99999", id="no-such-port"),
        pytest.param(f"{'a' * 70}:6379", "nobody answers at aaa", id="no-such-name"),
    ],
)
def test_what_can_be_no_address_is_refused(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        check_reachable(address)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({}, "asks for a token: set RAY_AUTH_MODE=token", id="no-mode"),
        pytest.param(
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f"}, "refuses the token in RAY_AUTH_TOKEN:", id="token"
        ),
        pytest.param(
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "there is no file /nowhere", id="no-file"
        ),
        pytest.param(
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": __file__}, f"refuses the token in {__file__}:", id="file"
        ),
    ],
)
def test_a_refused_token_is_named_by_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in refused_token("head:6379")

"""Is a Ray head behind an address, and does it take our token? Asked before Ray connects to it.

Ray itself repeats the question for 20 s, fills the screen, and does not say that the token was wrong; at a port of
another kind, such as the job server's, it waits for ever.
"""

import os
import socket
from pathlib import Path

import grpc  # type: ignore[import-untyped]
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import AuthenticationError

from sparsetrain.errors import ClusterError

LOCAL = "local"
AUTO = "auto"

_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 5.0
_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The first thing that Ray asks a head, too."""


def check_head(address: str) -> None:
    """Refuse an address at which there is no Ray head that takes our token.

    Args:
        address: host:port; `auto` is what Ray makes of it; `local` is not looked at.

    Raises:
        ClusterError: Not of that form, nobody answers within seconds, it is no head, or it wants another token.
    """
    if address == LOCAL:
        return
    if address == AUTO:
        address = canonicalize_bootstrap_address(AUTO) or LOCAL
        if address == LOCAL:  # left to Ray, which says what it has tried
            return
    check_reachable(address)
    if "RAY_USE_TLS" in os.environ:  # left to Ray, which has the certificates
        return
    try:
        headers = get_auth_headers_if_auth_enabled({})
    except AuthenticationError:
        headers = {}
    metadata = [(name.lower(), value) for name, value in headers.items()]
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_QUESTION)(b"", timeout=_ANSWER_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(refused_token(address)) from None
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ClusterError(
                    f"what answers at {address} is no Ray head. Give the port that `ray start --head` names (6379 by "
                    "default); with the job server's (http://host:8265) use `sparsetrain submit`."
                ) from error


def check_reachable(address: str) -> None:
    """Refuse an address that nobody listens on.

    Raises:
        ClusterError: Not host:port, or no connection within three seconds.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"{address} is not a Ray address: expected host:port, auto or local.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the latter two: no such port or name is possible
        raise ClusterError(
            f"nobody answers at {address} ({first_line(error)}). Is the Ray cluster running, and is the port right?"
        ) from error


def refused_token(address: str) -> str:
    """Say that a cluster refuses our token, and where that comes from."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"{address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the "
            "cluster's."
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return f"{address} refuses the token in RAY_AUTH_TOKEN: it is not this cluster's."
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if not Path(file).expanduser().is_file():
        return f"{address} asks for a token, and there is no file {file}: set RAY_AUTH_TOKEN to the cluster's token."
    return f"{address} refuses the token in {file}: it is not this cluster's."


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""Our launcher of Flower's SuperLink: TLS, node authentication, process isolation with its secret, a bearer token on Control.

A stock SuperLink must not be exposed: its Control API has no account check. A middleware also compares the sender that a node
states for its messages with the node that authenticated, which Flower leaves open. State is one SQLite file.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from flwr.common.constant import ACCESS_TOKEN_KEY, ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.superlink import main as superlink_main
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint


class BearerPlugin(NoOpControlAuthnPlugin):  # type: ignore[misc]
    """Control answers only who holds the operator's token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[bool, Any]:
        """Compares in constant time."""
        given = [str(value) for key, value in metadata if key == ACCESS_TOKEN_KEY]
        if len(given) != 1 or not hmac.compare_digest(given[0].encode(), self._token.encode()):
            return False, None
        return super().validate_tokens_in_metadata(metadata)  # type: ignore[no-any-return]

    def refresh_tokens(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[None, None]:
        """Never: a token is a file."""
        return None, None


class SenderMiddleware(BaseHTTPMiddleware):  # type: ignore[misc]
    """Refuses messages whose stated sender is not the node that authenticated (403)."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Checks recognised pushes, lets the rest pass."""
        push = getattr(request.state, "protobuf_request", None)
        if isinstance(push, PushMessagesRequest) and any(
            m.metadata.src_node_id != push.node.node_id for m in push.messages_list
        ):
            return JSONResponse({"detail": "sender is not the authenticated node"}, status_code=403)
        return await call_next(request)


def make_app(host: str, port: int, tls: Path, database: Path, secret: bytes, token: str) -> Any:
    """The SuperLink's ASGI application.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        tls: Folder with ``ca.crt``, ``tls.crt`` and ``tls.key``.
        database: SQLite file.
        secret: The SuperExec secret.
        token: The operator's bearer token.
    """
    stock = superlink_main._get_middleware
    superlink_main._get_middleware = lambda: [*stock(), Middleware(SenderMiddleware)]
    files = [tls / name for name in ("ca.crt", "tls.crt", "tls.key")]
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=host,
        port=port,
        insecure=False,
        certificates=(files[0].read_bytes(), files[1].read_bytes(), files[2].read_bytes()),
        superexec_auth_secret=secret,
        authn_plugin=BearerPlugin(token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(files[0]),
        ssl_certfile=str(files[1]),
        ssl_keyfile=str(files[2]),
        database=str(database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    try:
        return superlink_main.create_app(config, SuperLinkLifespan)
    finally:
        superlink_main._get_middleware = stock


def serve(host: str, port: int, tls: Path, database: Path, secret: bytes, token: str) -> None:
    """Serves until a signal; one worker, since the state's owner is this process."""
    app = make_app(host, port, tls, database, secret, token)
    uvicorn.run(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        workers=1,
        ssl_keyfile=str(tls / "tls.key"),
        ssl_certfile=str(tls / "tls.crt"),
    )

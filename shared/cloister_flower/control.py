"""The SuperLink's Control API with the operator's token: registering nodes, starting and stopping runs."""

from __future__ import annotations

import ssl
import time
from types import TracebackType
from typing import Any

import httpx
from cloister_shared.errors import StateError
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from cloister_flower import POLL_SECONDS


class _Bearer:
    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


class Control:
    """A connection to the Control API.

    Args:
        address: ``host:port``.
        ca: PEM of the CA.
        token: The operator's token.
    """

    def __init__(self, address: str, ca: bytes, token: str) -> None:
        self._address = address
        self._client = ControlHttpClient.from_server_address(
            address, False, ca, [RuntimeVersionHttpInterceptor(component_name="flwr-cli"), _Bearer(token)]
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def _call(self, name: str, request: Any) -> Any:
        try:
            return getattr(self._client, name)(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise StateError(
                    "the operator's token is refused",
                    where=self._address,
                    mend="use the token file of this federation (control.token)",
                ) from error
            raise StateError(
                f"SuperLink refused {name}",
                where=self._address,
                got=f"{error.response.status_code} {error.response.text[:200]}",
            ) from error
        except (httpx.TransportError, ssl.SSLError) as error:
            raise StateError(
                "SuperLink cannot be reached", where=self._address, got=str(error), mend="cloister coordinator up"
            ) from error

    def wait_up(self, seconds: float) -> None:
        """Waits until SuperLink answers.

        Raises:
            StateError: It does not, or refuses the token.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                self._client.ListNodes(ListNodesRequest())
            except httpx.TransportError:
                if time.monotonic() > end:
                    break
                time.sleep(POLL_SECONDS)
            except httpx.HTTPStatusError:
                break
            else:
                return
        self.nodes()

    def nodes(self) -> dict[bytes, int]:
        """Registered nodes' ids by their public keys."""
        answer = self._call("ListNodes", ListNodesRequest())
        return {
            bytes(node.public_key): int(node.node_id) for node in answer.nodes_info if node.status != "unregistered"
        }

    def online(self) -> set[int]:
        """Ids of the nodes whose heart beats."""
        return {
            int(node.node_id)
            for node in self._call("ListNodes", ListNodesRequest()).nodes_info
            if node.status == "online"
        }

    def register(self, pem: bytes, name: str) -> int:
        """Registers a node by its public key, if it is not yet; returns its id."""
        key = public_key_to_bytes(load_pem_public_key(pem))
        known = self.nodes()
        if key not in known:
            known[key] = int(self._call("RegisterNode", RegisterNodeRequest(public_key=key, name=name)).node_id)
        return known[key]

    def unregister(self, pem: bytes) -> bool:
        """Takes a node's registration away: its next call is refused. Whether there was one."""
        node = self.nodes().get(public_key_to_bytes(load_pem_public_key(pem)))
        if node is not None:
            self._call("UnregisterNode", UnregisterNodeRequest(node_id=node))
        return node is not None

    def start_run(self, content: bytes, digest: str) -> int:
        """Starts a run of our bundle; returns Flower's run id.

        Raises:
            StateError: SuperLink refuses.
        """
        answer = self._call(
            "StartRun", StartRunRequest(fab=Fab(hash_str=digest, content=content), federation=NOOP_FEDERATION_ID)
        )
        if not answer.run_id:
            raise StateError("SuperLink started no run", where=self._address)
        return int(answer.run_id)

    def stop_if_running(self, run: int) -> None:
        """Stops a run of a coordinator that died; one that is over or forgotten is left alone."""
        try:
            self._client.StopRun(StopRunRequest(run_id=run))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise StateError(
                    "the operator's token is refused",
                    where=self._address,
                    mend="use the token file of this federation (control.token)",
                ) from error
        except (httpx.TransportError, ssl.SSLError) as error:
            raise StateError(
                "SuperLink cannot be reached", where=self._address, got=str(error), mend="cloister coordinator up"
            ) from error

"""Starting Flower's SuperNode with our settings: process isolation, TLS on both sides, node authentication, our pace."""

from __future__ import annotations

from pathlib import Path

from cloister_shared.errors import StateError
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import ISOLATION_MODE_PROCESS
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli.flower_supernode import SuperNodeLifespanConfig, _start_supernode_http_api
from flwr.supernode.nodestate import NodeStateFactory

from cloister_flower import pace
from cloister_flower.loop import mend_loop


def serve(superlink: str, ca: bytes, key_file: Path, tls: Path, port: int, secret: bytes) -> None:
    """Serves until a signal.

    Args:
        superlink: ``host:port`` of the SuperLink.
        ca: PEM of the CA that signed its certificate.
        key_file: The node's P-384 key in OpenSSH form.
        tls: Folder with ``tls.crt`` and ``tls.key`` of the loopback Runtime API.
        port: The Runtime API's port on 127.0.0.1.
        secret: The SuperExec secret.

    Raises:
        StateError: The key is of another kind.
    """
    key = load_ssh_private_key(key_file.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError("not a SuperNode key", where=str(key_file), expected="P-384 in OpenSSH form")
    pace.quicken_supernode()
    pace.quicken_pulls()
    pace.bound_pulls(pace.MESSAGE_SECONDS)
    mend_loop()
    config = SuperNodeLifespanConfig(
        server_address=superlink,
        root_certificates=ca,
        insecure=False,
        authentication_keys=(key, key.public_key()),
        max_retries=None,
        max_wait_time=None,
        node_config={},
        isolation=ISOLATION_MODE_PROCESS,
        runtime_certificates=None,
        runtime_root_certificates_path=None,
        health_server_address=None,
        trusted_entities=None,
        superexec_auth_secret=secret,
        runtime_dependency_install=False,
        host="127.0.0.1",
        port=port,
        runtime_ssl_certfile=str(tls / "tls.crt"),
        runtime_ssl_keyfile=str(tls / "tls.key"),
    )
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    _start_supernode_http_api(config, factory)
    loop.start_client_internal(
        state_factory=factory,
        server_address=superlink,
        node_config={},
        root_certificates=ca,
        insecure=False,
        authentication_keys=config.authentication_keys,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_api_address=f"127.0.0.1:{port}",
        superexec_auth_secret=secret,
        runtime_dependency_install=False,
    )

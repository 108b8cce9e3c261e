"""The small CA: a handshake over loopback, and names that do not match."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cloister_shared.tls import make_node_key, make_tls
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOSTS = ("localhost", "relay.example.org", "127.0.0.1", "::1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls")
    make_tls(path, "demo", HOSTS)
    return path


def _handshake(server_files: Path, ca: Path, name: str) -> bytes:
    """One connection over loopback; what the server said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_files / "tls.crt", server_files / "tls.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            with contextlib.suppress(OSError):
                raw, _ = listener.accept()
                with raw:
                    raw.settimeout(10)
                    with context.wrap_socket(raw, server_side=True) as tls:
                        tls.sendall(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        client = ssl.create_default_context(cafile=str(ca))
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as raw,
                client.wrap_socket(raw, server_hostname=name) as tls,
            ):
                return tls.recv(5)
        finally:
            thread.join(10)


@pytest.mark.parametrize("name", HOSTS)
def test_handshake_under_every_name(folder: Path, name: str) -> None:
    assert _handshake(folder, folder / "ca.crt", name) == b"hello"


@pytest.mark.parametrize("name", ["example.org", "x.localhost", "127.0.0.2"])
def test_other_names_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _handshake(folder, folder / "ca.crt", name)


def test_certificate_of_another_ca_is_refused(folder: Path, tmp_path: Path) -> None:
    make_tls(tmp_path, "demo", HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(folder, tmp_path / "ca.crt", "localhost")


def test_leaf_is_no_ca_and_files_have_their_modes(folder: Path) -> None:
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert modes["tls.key"] == 0o600
    assert set(modes) == {"ca.crt", "tls.crt", "tls.key"}
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(folder, folder / "tls.crt", "example.org")


def test_node_key(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node")
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o600
    private = serialization.load_ssh_private_key((tmp_path / "node").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    again = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert again == public

"""Two small certificate authorities: P-384 keys, X.509, keys made on the machine that uses them and written mode 0600.

``make_tls`` is for an organisation's own servers: its CA's key is thrown away, certificates last 398 days. ``make_site_ca`` and
``certify`` are the coordinator's, for sites' short-lived certificates. There is no revocation list: who checks a call checks the
certificate's serial and expiry in a list of its own (``cloister_server.enrolment``).
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister_shared.encoding import write_durably
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.signing import read_secret

CA_FILE, CERT_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"
SITE_CA_FILE, SITE_CA_KEY = "site-ca.crt", "site-ca.key"
_LIFE, _CA_LIFE, _EARLY = datetime.timedelta(days=398), datetime.timedelta(days=3650), datetime.timedelta(minutes=5)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_tls(folder: Path, common: str, hosts: tuple[str, ...]) -> None:
    """Makes a CA whose key is thrown away, and one server certificate for ``hosts``, in ``folder``.

    Args:
        folder: Gets ``ca.crt``, ``tls.crt`` and ``tls.key``.
        common: Common name.
        hosts: Names and addresses the certificate is for.
    """
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())

    def builder(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(f"{common} CA"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLY)
            .not_valid_after(now + _LIFE)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    usage = {
        "digital_signature": False,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    ca = (
        builder(f"{common} CA", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**(usage | {"key_cert_sign": True, "crl_sign": True})), critical=True)
        .sign(ca_key, hashes.SHA384())
    )
    leaf = (
        builder(common, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**(usage | {"digital_signature": True})), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(h) for h in hosts]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write_durably(folder / CA_FILE, ca.public_bytes(serialization.Encoding.PEM), mode=0o644)
    write_durably(folder / CERT_FILE, leaf.public_bytes(serialization.Encoding.PEM), mode=0o644)
    write_durably(folder / KEY_FILE, _pem(key), mode=0o600)


def make_site_ca(folder: Path, common: str) -> None:
    """Makes the CA that sites' certificates come from, ``site-ca.crt`` and ``site-ca.key`` in ``folder``."""
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now(datetime.UTC)
    name = _name(f"{common} sites CA")
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA384())
    )
    write_durably(folder / SITE_CA_KEY, _pem(key), mode=0o600)
    write_durably(folder / SITE_CA_FILE, made.public_bytes(serialization.Encoding.PEM), mode=0o644)


def make_request(name: str) -> tuple[bytes, bytes]:
    """A fresh P-384 key and a signing request for it, both PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA384())
    return _pem(key), request.public_bytes(serialization.Encoding.PEM)


def certify(folder: Path, request: bytes, site: str, life: datetime.timedelta) -> x509.Certificate:
    """A client certificate for the request's key; its name is ``site``, whatever the request says.

    Args:
        folder: Where ``make_site_ca`` wrote.
        request: PEM.
        site: The site's name.
        life: From now.

    Raises:
        VerificationError: The request is malformed, of another kind of key, or not signed by it.
    """
    try:
        wanted = x509.load_pem_x509_csr(request)
        public, good = wanted.public_key(), wanted.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise VerificationError("not a signing request", where=f"site {site}", got=str(error)[:100]) from error
    if not (good and isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP384R1)):
        raise VerificationError(
            "a signing request of another key", where=f"site {site}", expected="P-384, signed by itself"
        )
    authority = x509.load_pem_x509_certificate((folder / SITE_CA_FILE).read_bytes())
    key = serialization.load_pem_private_key(read_secret(folder / SITE_CA_KEY), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError("the sites' CA has another kind of key", where=str(folder / SITE_CA_KEY))
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(site))
        .issuer_name(authority.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .sign(key, hashes.SHA384())
    )


def make_node_key(path: Path) -> bytes:
    """Makes a SuperNode's P-384 key in OpenSSH form at ``path``; returns the public half as PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_durably(path, private, mode=0o600)
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

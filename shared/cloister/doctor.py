"""What ``cloister doctor`` looks at: this installation, the coordinator and the sites here. It changes nothing and asks no network.

Each look gives lines of what is well, of what somebody should know, and of what is wrong with its mend; one that fails is told as wrong
and does not end the others.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_shared.cards import read_coordinator_card
from cloister_shared.errors import CloisterError
from cloister_shared.installed import lock_file
from cloister_shared.signing import SigningKey
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from cloister_server.tables import Leaf

LEAST_BYTES = 1 << 30
SOON_DAYS = 14
OK, NOTE, WRONG = "ok", "note", "wrong"
_SECRETS = ("sign.key", "control.token", "superexec.secret", "tls/tls.key", "tls/site-ca.key")
_CERTIFICATES = {"ca.crt": "", "tls.crt": "tls.key", "site-ca.crt": "site-ca.key"}
_PLAIN = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
_RESTORE = "restore it from a copy of the coordinator's folder"


@dataclass(frozen=True)
class Look:
    """One thing that was looked at.

    Attributes:
        what: What it is.
        state: ``ok``; ``note``, where it may be meant so; ``wrong``.
        found: How it is, in one line.
        mend: What to do where it is not well.
    """

    what: str
    state: str
    found: str
    mend: str = ""


def looks(home: Path, coordinator: Path, sites: list[Path]) -> Iterator[Look]:
    """Everything there is to look at, in order.

    Args:
        home: The folder of state.
        coordinator: The coordinator's folder in it; it may be missing.
        sites: Sites' folders in it.
    """
    parts: list[tuple[str, Callable[[], Iterator[Look]]]] = [
        ("packages", packages),
        ("sandbox", sandbox),
        ("device", device),
        ("disk", lambda: disk(home)),
    ]
    if home.exists() and not home.is_dir():
        yield Look("state", WRONG, f"{home} is no folder", "--home, where the folder of state is")
    elif not coordinator.is_dir() and not sites:
        yield Look("state", NOTE, f"nothing of a federation is here: {home}", "--home, where it is elsewhere")
    for folder in sorted((home / "sites").glob("*/")):
        if not (folder / "site.toml").is_file():
            yield Look(
                f"site {folder.name}", WRONG, f"{folder / 'site.toml'} is missing", "restore it from a copy of the site"
            )
    if coordinator.is_dir():
        parts.append(("coordinator", lambda: of_coordinator(coordinator)))
    for folder in sites:
        parts.append((f"site {folder.name}", lambda folder=folder: of_site(folder, home)))  # type: ignore[misc]
    for name, part in parts:
        try:
            yield from part()
        except CloisterError as error:
            yield Look(name, WRONG, _said(error), error.mend or "mend, or restore, what is named")
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            yield Look(name, WRONG, named, "restore it, or see to its owner and mode")
        except (ValueError, KeyError, TypeError) as error:
            yield Look(name, WRONG, f"something of it cannot be read: {error}"[:300], "restore it from a copy")


def _said(error: CloisterError) -> str:
    parts = (f"{error.where}: {error.what}" if error.where else error.what, error.expected, error.got)
    return "; ".join(f"{word}{part}" for word, part in zip(("", "expected ", "got "), parts, strict=True) if part)


def packages() -> Iterator[Look]:
    """Python, and what is installed against the lock file."""
    other = []
    for line in lock_file().read_text().splitlines():
        if "==" not in line or line.startswith(" "):
            continue
        wanted = Requirement(line.removesuffix(" \\"))
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if found not in wanted.specifier:
            other.append(f"{wanted.name} {found} instead of {wanted.specifier}")
    yield Look("python", OK, ".".join(map(str, sys.version_info[:3])))
    mend = "pip install --no-deps --require-hashes -r requirements.lock"
    # An auditor's machine may have others: what is audited was not made with them.
    state = OK if not other else WRONG if _trains() else NOTE
    yield Look("packages", state, ", ".join(other)[:300] or "as the lock file has them", mend if other else "")


def _trains() -> bool:
    return find_spec("torch") is not None


def sandbox() -> Iterator[Look]:
    """Whether an agent could shut its own door here."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if not _trains():
            yield Look("sandbox", OK, "no agent runs here: torch is not installed")
            return
        yield Look("sandbox", WRONG, f"an agent cannot shut its door: {error}", "Linux: apt-get install libseccomp2")
        return
    pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    yield Look("sandbox", OK, "seccomp is there: an agent can shut its door")


def device() -> Iterator[Look]:
    """What there is to train on."""
    try:
        import torch
    except ImportError:
        yield Look("device", OK, "torch is not installed: an auditor's machine, or half an installation")
        return
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device: the CPU"
    yield Look("device", OK, f"torch {torch.__version__}, {cuda}")


def disk(home: Path) -> Iterator[Look]:
    """Room for state."""
    folder = next(p for p in (home, *home.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    yield Look(
        "disk",
        OK if free >= LEAST_BYTES else WRONG,
        f"{free / (1 << 30):.1f} GiB free at {folder}",
        "free space, at least 1 GiB",
    )


def of_coordinator(home: Path) -> Iterator[Look]:
    """Keys, certificates, registry and log of the coordinator that is here."""
    from cloister_server.blobs import Blobs
    from cloister_server.coordinator import open_coordinator
    from cloister_server.database import Database
    from cloister_server.fsck import check
    from cloister_server.storage import has_registry, read_storage
    from cloister_server.store import Store

    yield from _secrets(home)
    for name, key in _CERTIFICATES.items():
        yield from _certificate("coordinator", home / "tls" / name, "make the federation anew, or have it signed again")
        if key:
            yield from _pair(home / "tls" / key, home / "tls" / name)
    card = read_coordinator_card(home / "card.json")
    if SigningKey.load(home / "sign.key").verify_key.raw != card.verify_key.raw:
        yield Look("coordinator", WRONG, f"{home / 'card.json'} is of another key than sign.key", _RESTORE)
    federation = open_coordinator(home).federation
    yield Look("federation", OK, f"{federation.name}: {federation.path}")
    yield from _base(federation.base, str(federation.path), card.base)
    if not has_registry(home):
        yield Look(
            "registry",
            WRONG,
            f"there is none in {home}",
            "restore it from a copy; cloister run makes one where nothing ever ran",
        )
        return
    storage = read_storage(home)
    database = Database(storage.database, Blobs(storage.blobs).held, migrating=True)
    version = database.version()
    database.close()
    yield Look("registry", OK, f"version {version or 'none yet'} at {database.where}")
    if not version:
        yield Look("registry", WRONG, f"there are no tables at {database.where}", "restore it from a copy")
        return
    store = Store(home)
    try:
        wrong = list(check(store))
        for one in wrong[:20]:
            yield Look("registry", WRONG, f"{one.where}: {one.what}", one.mend)
        if not wrong:
            yield Look("registry", OK, "whole: rounds, leaves, aliases, blobs, rules (cloister registry fsck)")
        late = _newest(store.leaves()[-1:]) - time.time()
        yield Look(
            "clock",
            OK if late < 60 else WRONG,
            "not behind the log" if late < 60 else f"{late / 3600:.1f} hours behind the log's newest leaf",
            "" if late < 60 else "set the clock: certificates and plans go by it, order does not",
        )
        unfinished = [run for run in store.runs() if run.finished is None]
        for run in unfinished[:-1]:
            yield Look("run", NOTE, f"{run.id[:8]} was left unfinished, and a newer one began")
    finally:
        store.close()


def of_site(home: Path, root: Path) -> Iterator[Look]:
    """Settings, keys, socket, base model, certificate and ledger of a site that is here."""
    from cloister_client.policy import read_policy
    from cloister_client.registry import IDENTITY
    from cloister_client.site import is_up, read_site

    site = read_site(home)
    what = f"site {site.name}"
    read_policy(home / "policy.toml")
    site.socket  # noqa: B018  its path may be too long
    apart = "agent and relay are different users" if site.isolated else "NOT ISOLATED: agent and relay run as one user"
    yield Look(what, OK if site.isolated else NOTE, f"{apart}; {'up' if is_up(home) else 'not up'}")
    for path in (site.agent_home, site.agent_home / "sign.key"):
        mode = path.stat().st_mode & 0o077
        if mode:
            yield Look(what, WRONG, f"others may read {path}", f"chmod go= {path}")
    if (home / IDENTITY).is_file():
        yield from _certificate(
            what, home / IDENTITY, "cloister site up renews it; once it is over: cloister site rejoin TOKEN"
        )
    yield from _base(site.base, str(home / "site.toml"), site.coordinator().base)
    if not (site.agent_home / "ledger.db").exists():
        mend = "put the newest ledger back; if it is lost, its text counts as spent: register none of it again"
        yield Look(what, WRONG, f"its ledger is missing: {site.agent_home / 'ledger.db'}", mend)
        return
    # A process of its own: it becomes the agent's user for good.
    command = [sys.executable, "-m", "cloister.cli", "--json", "--home", str(root), "privacy", "status", site.name]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode:
        # Its errors are JSON on standard output; anything else is told as it came.
        error = json.loads(last) if last.startswith("{") else {"what": (done.stderr or last)[-300:]}
        found = "; ".join(str(error[k]) for k in ("where", "what", "expected", "got") if k in error)
        yield Look(what, WRONG, f"ledger: {found}", str(error.get("mend", "restore what is named")))
    else:
        blocks = json.loads(last)["sites"][0]["blocks"]
        spent = ", ".join(f"{b['name']} {b['spent']:.3f} of {b['cap']:g}" for b in blocks) or "nothing registered yet"
        yield Look(what, OK, f"ledger holds together, and is the one that its counter knows: {spent}")


def _newest(leaves: list[Leaf]) -> float:
    """When the last of them was written, by its own word; 0 where it has none."""
    for leaf in leaves:
        try:
            return float(json.loads(leaf.record)["at"])
        except (ValueError, KeyError, TypeError):
            break  # fsck has named it
    return 0.0


def _secrets(home: Path) -> Iterator[Look]:
    for name in _SECRETS:
        path = home / name
        if not path.is_file():
            yield Look("coordinator", WRONG, f"{path} is missing", _RESTORE)
        elif path.stat().st_mode & 0o077:
            yield Look("coordinator", WRONG, f"others may read {path}", f"chmod go= {path}")


def _pair(key: Path, certificate: Path) -> Iterator[Look]:
    if not key.is_file() or not certificate.is_file():
        return  # named already
    try:
        own = load_pem_private_key(key.read_bytes(), None).public_key().public_bytes(*_PLAIN)
        named = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key().public_bytes(*_PLAIN)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        yield Look("coordinator", WRONG, f"{key} or {certificate} cannot be read", _RESTORE)
        return
    if own != named:
        yield Look("coordinator", WRONG, f"{certificate} is of another key than {key}", _RESTORE)


def _certificate(what: str, path: Path, mend: str) -> Iterator[Look]:
    if not path.is_file():
        yield Look(what, WRONG, f"{path} is missing", _RESTORE)
        return
    text = path.read_bytes()
    try:
        found = x509.load_pem_x509_certificate(text[text.index(b"-----BEGIN CERTIFICATE-----") :])
    except ValueError:
        yield Look(what, WRONG, f"{path} is no certificate", mend)
        return
    now = datetime.datetime.now(datetime.UTC)
    left = (found.not_valid_after_utc - now).total_seconds() / 86_400
    whole = (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds() / 86_400
    if found.not_valid_before_utc > now:
        yield Look(what, WRONG, f"{path.name} is not valid yet: the clock is behind", "set the clock")
        return
    # A short certificate is renewed while the site is up: only one that is over is wrong.
    fine = left > (SOON_DAYS if whole > 2 * SOON_DAYS else 0)
    until = f"{'is over since' if left < 0 else 'is good until'} {found.not_valid_after_utc:%F %R} UTC"
    yield Look(what, OK if fine else WRONG, f"{path.name} {until}", "" if fine else mend)


def _base(source: str, where: str, pinned: str) -> Iterator[Look]:
    from cloister_model.base import find_base

    base = find_base(source, where)
    fine = base.digest == pinned
    found = f"base model {base.digest[:16]} at {base.path}"
    yield Look("base model", OK if fine else WRONG, found, "" if fine else f"put the pinned model there: {pinned}")

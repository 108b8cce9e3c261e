"""A site's folder: settings, keys and where things lie. Made by ``enrol``, read by agent, relay and SuperNode.

    site.toml  policy.toml  coordinator.json (pinned)  card.json (public)
    agent/   0700, the agent's user: sign.key, seal.key, unit.key, ledger.db, kept/, status.json, agent.log
    counter/ 0700, the agent's user: the newest point of the ledger, kept apart (put it on another disk: `counter` in site.toml)
    link/    the relay's and SuperNode's: node.key, superexec.secret, ca.crt (coordinator), tls/ (loopback)

The socket lies in a short runtime folder of mode 0750, since a Unix socket's path holds 108 bytes (104 on macOS).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cloister_shared.cards import CoordinatorCard, SiteCard, check_name, read_coordinator_card, read_site_card
from cloister_shared.encoding import write_durably
from cloister_shared.errors import InputError, StateError
from cloister_shared.sealing import OpeningKey
from cloister_shared.settings import quote, read_toml
from cloister_shared.signing import SigningKey
from cloister_shared.tls import make_node_key, make_tls
from cloister_shared.witness import FEDERATION_LOGS, log_of_federation

from cloister_client.policy import Policy

SOCKET = "agent.sock"
UP_LOCK = "up.lock"
AGAIN = "again"
# Cards of keys that this site had before it joined again.
EARLIER = "earlier"
# Where a pull leaves the head that it saw.
PULLED = "pulled.head"
MAX_SOCKET_PATH = 104


@dataclass(frozen=True)
class Site:
    """A site's settings.

    Attributes:
        home: Its folder.
        name: Its name.
        counter: File that the ledger's newest point is kept in.
        base: ``minilm`` or a folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads of the agent, 0 for all; the next power of two below is used.
        runtime_port: Loopback port of the SuperNode's Runtime API.
        agent_user: User id of the agent, or -1 for the caller's.
        link_user: User id of relay and SuperNode, or -1.
        group: Group id that both share, or -1.
    """

    home: Path
    name: str
    counter: Path
    base: str
    device: str
    threads: int
    runtime_port: int
    agent_user: int
    link_user: int
    group: int

    @property
    def agent_home(self) -> Path:
        """The agent's private folder."""
        return self.home / "agent"

    @property
    def link_home(self) -> Path:
        """The relay's and SuperNode's folder."""
        return self.home / "link"

    @property
    def runtime(self) -> Path:
        """The short folder of the socket; named by the site's folder, so that it is found again."""
        name = f"cloister-{hashlib.sha256(str(self.home.resolve()).encode()).hexdigest()[:12]}"
        return Path(os.environ.get("CLOISTER_RUNTIME", "/tmp")) / name  # noqa: S108  # owner and mode are checked

    @property
    def socket(self) -> Path:
        """The agent's Unix socket.

        Raises:
            StateError: Its path would be too long.
        """
        path = self.runtime / SOCKET
        if len(os.fsencode(path)) >= MAX_SOCKET_PATH:
            raise StateError(
                "the socket's path is too long",
                where=str(path),
                expected=f"< {MAX_SOCKET_PATH} bytes",
                mend="set CLOISTER_RUNTIME to a short folder",
            )
        return path

    @property
    def isolated(self) -> bool:
        """Whether agent and relay run as different users."""
        return self.agent_user >= 0 and self.link_user >= 0 and self.agent_user != self.link_user

    def coordinator(self) -> CoordinatorCard:
        """The pinned coordinator."""
        return read_coordinator_card(self.home / "coordinator.json")


def make_runtime(site: Site) -> Path:
    """Makes the socket's folder, mode 0750, and refuses one that somebody else made.

    Raises:
        StateError: It is there and another user's, or open to others.
    """
    path = site.runtime
    try:
        path.mkdir(mode=0o750)
    except FileExistsError:
        pass
    except OSError as error:
        raise StateError(
            "cannot make the socket's folder", where=str(path), got=str(error), mend="set CLOISTER_RUNTIME"
        ) from error
    found = path.lstat()
    if (
        path.is_symlink()
        or not path.is_dir()
        or found.st_uid not in (os.getuid(), 0, site.agent_user)
        or found.st_mode & 0o027
    ):
        raise StateError(
            "the socket's folder is not ours",
            where=str(path),
            expected=f"mode 0750, user {os.getuid()}",
            mend="remove it",
        )
    if os.getuid() == 0:
        os.chown(path, site.agent_user, site.group)
    return path


@contextmanager
def held_up(home: Path) -> Iterator[None]:
    """Holds the site's folder while its processes run, or while its keys change.

    Raises:
        StateError: Somebody else does.
    """
    with (home / UP_LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError("this site is up already", where=str(home), mend="stop that `cloister site up`") from error
        yield


def is_up(home: Path) -> bool:
    """Whether somebody holds the site's folder."""
    try:
        with (home / UP_LOCK).open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def pulled_note(site: Site) -> str | None:
    """The newest head of the federation's log that a pull saw, as its coordinator signed it, unchecked; None before the first."""
    path, own = site.home / PULLED, log_of_federation(site.coordinator().verify_key)
    try:
        note = path.read_text() if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        what, mend = (
            "the head that a pull saw cannot be read",
            "see to the file's owner and mode, then cloister site pull",
        )
        # Told to the coordinator too, where a plan is refused for it: no path of this machine.
        got = error.strerror or "" if isinstance(error, OSError) else "no text"
        raise StateError(what, where=str(path), got=got, mend=mend) from error
    of = "" if note is None else note.partition("\n")[0]
    # Of the coordinator that this site had before it joined another one: it says nothing of this one's log.
    return None if re.fullmatch(f"{FEDERATION_LOGS}[0-9a-f]{{32}}", of) and of != own else note


def act_as_agent(site: Site) -> None:
    """Becomes the agent's user where this is root and the site has one: its folder is its own, and root must not walk there.

    Raises:
        StateError: The change is not possible.
    """
    if os.getuid() != 0 or not site.isolated or site.agent_home.stat().st_uid != site.agent_user:
        return
    try:
        os.setgroups([])
        os.setgid(site.group if site.group >= 0 else site.agent_user)
        os.setuid(site.agent_user)
    except OSError as error:
        raise StateError("cannot become the agent's user", where=f"user {site.agent_user}", got=str(error)) from error


def read_site(home: Path) -> Site:
    """Reads ``site.toml``.

    Raises:
        InputError: Missing or malformed.
    """
    path = home / "site.toml"
    if not path.is_file():
        raise InputError("no site here", where=str(home), expected="site.toml", mend="cloister site enrol, or --home")
    table = read_toml(path, "site settings")
    processes = table.table("processes")
    site = Site(
        home=home.resolve(),
        name=check_name(table.text("name"), str(path)),
        counter=home.resolve() / Path(table.text("counter", "counter")).expanduser() / "ledger.json",
        base=table.text("base"),
        device=table.text("device", "auto", choices=("auto", "cpu", "cuda")),
        threads=table.integer("threads", 0, 1024, 0),
        runtime_port=table.integer("runtime_port", 1, 65535),
        agent_user=processes.integer("agent_user", -1, 1 << 31, -1),
        link_user=processes.integer("link_user", -1, 1 << 31, -1),
        group=processes.integer("group", -1, 1 << 31, -1),
    )
    for part in (processes, table):
        part.finish()
    return site


def enrol(
    home: Path,
    name: str,
    card: CoordinatorCard,
    policy: Policy,
    *,
    base: str,
    records: int,
    runtime_port: int,
    unit: str = "record",
    device: str = "auto",
    threads: int = 0,
) -> SiteCard:
    """Makes a site's folder with fresh keys and pins the coordinator; returns the card to hand over.

    Raises:
        InputError: A name is malformed, or there is a site already.
    """
    check_name(name, "site name")
    if (home / "site.toml").exists():
        raise InputError(
            "there is a site here already",
            where=str(home),
            mend="for other text choose another --home; for this text do not: what it has spent is in the ledger here, and nowhere else",
        )
    home.mkdir(parents=True, exist_ok=True)
    site_toml = f"""name = {quote(name)}
base = {quote(base)}
# "auto", "cpu" or "cuda"
device = {quote(device)}
threads = {threads}
runtime_port = {runtime_port}
# Folder of the ledger's counter, best on another disk: an older ledger that is put back is refused against it.
counter = "counter"

[processes]
# Numeric ids. Give the agent and the relay users of their own, sharing one group, and run `site up` as root.
agent_user = -1
link_user = -1
group = -1
"""
    for folder in (home / "agent" / "kept", home / "counter", home / "link" / "tls"):
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    write_durably(home / "agent" / "unit.key", secrets.token_bytes(32))
    make_tls(home / "link" / "tls", f"{name} runtime", ("127.0.0.1", "localhost"))
    write_durably(home / "link" / "superexec.secret", secrets.token_bytes(32))
    write_durably(home / "policy.toml", policy.to_toml().encode(), mode=0o644)
    own = _make_keys(
        home, card, SiteCard(name, "", "", "", records, unit, float(policy.epsilon_cap), float(policy.delta))
    )
    write_durably(home / "site.toml", site_toml.encode(), mode=0o644)
    return own


def _make_keys(home: Path, card: CoordinatorCard, own: SiteCard) -> SiteCard:
    """Fresh keys, the coordinator's card and the site's own, which says what ``own`` says."""
    signing, opening = SigningKey.generate(), OpeningKey.generate()
    signing.save(home / "agent" / "sign.key")
    opening.save(home / "agent" / "seal.key")
    node = make_node_key(home / "link" / "node.key")
    write_durably(home / "link" / "ca.crt", card.ca.encode(), mode=0o644)
    card.save(home / "coordinator.json")
    named = replace(own, key=signing.verify_key.raw.hex(), sealing=opening.sealing_key.raw.hex(), node=node.decode())
    named.save(home / "card.json", signing)
    return named


def begin_again(home: Path, card: CoordinatorCard, policy: Policy) -> Path:
    """Fresh keys and cards in a folder of their own, for a site that joins again; nothing of the site is touched.

    Returns:
        The folder, for ``take_over`` once its certificate is there.
    """
    again = home / AGAIN
    if again.exists():
        shutil.rmtree(again)
    for folder in (again, again / "agent", again / "link"):
        folder.mkdir(mode=0o700)
    own = read_site_card(home / "card.json")
    _make_keys(again, card, replace(own, epsilon_cap=float(policy.epsilon_cap), delta=float(policy.delta)))
    return again


def earlier_cards(home: Path) -> list[SiteCard]:
    """Cards of the keys that a site had before.

    Raises:
        StateError: They cannot be listed: what was signed with those keys is this site's, whoever hides them.
    """
    folder = home / EARLIER
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StateError(
            "the cards of earlier keys cannot be listed",
            where=str(folder),
            got=error.strerror or "",
            mend="see to the folder's owner and mode",
        ) from error
    return [read_site_card(folder / name) for name in names if name.endswith(".json")]


def take_over(home: Path) -> SiteCard:
    """Puts the keys of ``begin_again`` in the old ones' place; the ledger, its counter, the text and the policy stay.

    What breaks off is finished by calling it again: the certificate is the last to go.
    """
    again, own = home / AGAIN, read_site_card(home / "card.json")
    if (again / "card.json").exists():
        # What an auditor needs to know this site's earlier words by.
        card = home / EARLIER / f"{own.verify_key.id.hex()}.json"
        try:
            card.parent.mkdir(exist_ok=True)
            write_durably(card, (home / "card.json").read_bytes(), mode=0o644)
            # Whatever the umask: who says whom to trust may be another user.
            for path, mode in ((card.parent, 0o755), (card, 0o644)):
                if path.stat().st_mode & 0o777 != mode:
                    path.chmod(mode)
        except OSError as error:
            raise StateError(
                "the card of the key that this site had cannot be kept",
                where=str(card),
                got=error.strerror or "",
                mend="see to the folder's owner and mode, then the same command again",
            ) from error
    for name in (
        "agent/sign.key",
        "agent/seal.key",
        "link/node.key",
        "link/ca.crt",
        "coordinator.json",
        "card.json",
        "identity.pem",
    ):
        if (again / name).exists():
            folder = (home / name).parent
            if os.getuid() == 0:
                os.chown(again / name, folder.stat().st_uid, folder.stat().st_gid)
            os.replace(again / name, home / name)
    shutil.rmtree(again)
    return read_site_card(home / "card.json")

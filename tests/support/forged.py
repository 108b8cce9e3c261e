"""A federation's logs written by hand with every key in hand: honest by default, and whatever a test makes of it.

No process runs and nothing is trained: what a coordinator and its sites would have signed is signed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from hashlib import sha256
from typing import Any

from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import Audit, audit
from cloister_shared.audit.report import answers
from cloister_shared.audit.trust import Trust, trust_of
from cloister_shared.cards import SITE_PURPOSE, SiteCard
from cloister_shared.draw import Transcript, commit, reveal
from cloister_shared.encoding import canonical, digest
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.receipts import Receipt
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SigningKey
from cloister_shared.witness import log_of_federation, log_of_site
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

Terms = tuple[float, float, int]
RUN, RUN2 = "aa" * 16, "bb" * 16
TERMS: Terms = (2.0, 0.05, 20)
HUGE: Terms = (0.6, 0.2, 50)
DELTA = 1e-5


def named(*what: object) -> str:
    """A digest of whatever names a thing."""
    return sha256(repr(what).encode()).hexdigest()


@cache
def _node() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def card_of(name: str, key: SigningKey) -> dict[str, Any]:
    """A site's card as the log has it, signed."""
    sealing = OpeningKey.generate().sealing_key.raw.hex()
    card = SiteCard(name, key.verify_key.raw.hex(), sealing, _node(), 1000, "record", 8.0, DELTA)
    return card.body | {"signature": key.sign(SITE_PURPOSE, canonical(card.body)).hex()}


def head_of(origin: str, events: Sequence[bytes]) -> Checkpoint:
    """The head of these records."""
    return Checkpoint(origin, len(events), Tree(leaf_hash(e) for e in events).root())


@dataclass
class ForgedSite:
    """A site's key and its own log."""

    name: str
    key: SigningKey = field(default_factory=SigningKey.generate)
    origin: str = ""
    events: list[bytes] = field(default_factory=list)
    entries: int = 0
    at: float = 1.7e9

    def __post_init__(self) -> None:
        self.origin = self.origin or log_of_site(self.name.encode())

    @property
    def id(self) -> str:
        """Its key's id."""
        return self.key.verify_key.id.hex()

    @property
    def note(self) -> str:
        """The signed head of its log as it is now."""
        return head_of(self.origin, self.events).signed(self.key)

    @property
    def log(self) -> SiteLog:
        """Its log as it is now."""
        return SiteLog(tuple(self.events), self.note)

    def add(self, event: str, **facts: Any) -> None:
        """One event more."""
        self.at += 60
        self.events.append(canonical({"event": event, "at": self.at} | facts))

    def reserve(self, plan: str, run: str, number: int, terms: Terms = TERMS, **changes: Any) -> int:
        """A reservation."""
        self.entries += 1
        sigma, rate, steps = terms
        facts: dict[str, Any] = {
            "entry": self.entries, "plan": plan, "run": run, "round": number, "base": named("base"),
            "noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "delta": DELTA, "blocks": [1],
            "admitted": [0.5], "cap": 100.0, "noised": [], "secure": "",
        }  # fmt: skip
        self.add("reserve", **facts | changes)
        return self.entries

    def spend(self, entry: int, update: str) -> None:
        """Its update left."""
        self.add("spend", entry=entry, update=update, vector=update)


@dataclass
class Forged:
    """A coordinator's key and log, and its sites."""

    sites: tuple[ForgedSite, ...] = field(default_factory=lambda: tuple(ForgedSite(f"site-{i}") for i in (1, 2, 3)))
    key: SigningKey = field(default_factory=SigningKey.generate)
    leaves: list[SignedLeaf] = field(default_factory=list)
    trusted: dict[str, Any] = field(default_factory=dict)
    cosigned: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    draws: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    spent: dict[str, list[DpSgd]] = field(default_factory=dict)
    owed: dict[str, list[Receipt]] = field(default_factory=dict)
    masks: str = ""
    at: float = 1.7e9

    def __post_init__(self) -> None:
        self.origin = log_of_federation(self.key.verify_key)
        for site in self.sites:
            self.enrol(site)

    @property
    def head(self) -> Checkpoint:
        """The log's head as it is now."""
        return head_of(self.origin, [leaf.record for leaf in self.leaves])

    def leaf(self, kind: str, **facts: Any) -> int:
        """One leaf more; returns its index."""
        self.at += 60
        record = canonical(facts | {"log": self.origin, "index": len(self.leaves), "kind": kind, "at": self.at})
        self.leaves.append(SignedLeaf(record, self.key.verify_key.id.hex(), self.key.sign("log-leaf", record).hex()))
        return len(self.leaves) - 1

    def enrol(self, site: ForgedSite) -> None:
        """A site comes, under the key that it has now."""
        self.trusted[site.id] = (site.name, site.key.verify_key)
        self.leaf("enrol", site=site.name, card=card_of(site.name, site.key))

    def rejoin(self, site: ForgedSite) -> None:
        """A site is put out and comes again with a fresh key and its old log."""
        self.leaf("revoke", site=site.name)
        self.cosigned.pop(site.id, None)
        site.key = SigningKey.generate()
        self.enrol(site)

    def begin(self, run: str = RUN) -> None:
        """A run begins."""
        self.adapters[run] = named("start", run)
        self.leaf("policy", run=run, adapter=self.adapters[run], base=named("base"), config=named("c"), code="x")

    def show(self, site: ForgedSite) -> None:
        """A site takes its receipts and sees and cosigns the log's head."""
        for receipt in self.owed.pop(site.id, []):
            site.add("receipt", **asdict(receipt))
        at = self.head
        site.add("witness", note=at.signed(self.key), log=at.origin, size=at.size, root=at.root.hex())
        self.cosigned[site.id] = (at.size, at.root.hex(), at.cosigned(site.id, site.key, 1))

    def train(self, site: ForgedSite, run: str, number: int, terms: Terms = TERMS, **changes: Any) -> str:
        """A site sees the log, reserves, spends; returns its work."""
        self.show(site)
        plan = named(run, number, site.id)
        site.spend(site.reserve(plan, run, number, terms, **changes), named("update", plan))
        return plan

    def row(self, site: ForgedSite, run: str, number: int, terms: Terms = TERMS, **changes: Any) -> dict[str, Any]:
        """What the coordinator says of a site; epsilon as an honest one publishes it, whatever the rest says."""
        sigma, rate, steps = terms
        plan, charged = named(run, number, site.id), changes.get("charged", 1)
        history = self.spent.setdefault(site.name, [])
        history += [DpSgd(sigma, rate, steps * charged)] if charged else []
        facts = {
            "client": site.id, "name": site.name, "plan": plan, "verdict": "accepted", "update": named("update", plan),
            "noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "delta": DELTA,
            "epsilon": epsilon(history, DELTA), "charged": 1, "head": site.note, "weight": 1.0,
        }  # fmt: skip
        return facts | changes

    def commit(
        self,
        run: str,
        number: int,
        rows: list[dict[str, Any]],
        sums: Iterable[list[str]] = (),
        draw: str = "",
        **more: Any,
    ) -> int:
        """A round's commit, and its receipts."""
        start, self.adapters[run] = self.adapters[run], named("made", run, number)
        facts: dict[str, Any] = {
            "run": run, "round": number, "start": start, "adapter": self.adapters[run], "base": named("base"),
            "clients": rows, "sums": [{"clients": json.dumps(one)} for one in sums], "metrics": {"accuracy": 0.5}, "attempt": 1,
        }  # fmt: skip
        index = self.leaf("round_commit", **facts | more | ({"draw": draw} if draw else {}))
        leaf = leaf_hash(self.leaves[index].record).hex()
        for row in rows:
            update = row["update"] if row["verdict"] == "accepted" else ""
            receipt = Receipt(run, number, row["plan"], update, row["verdict"], self.adapters[run], index, leaf)
            self.owed.setdefault(row["client"], []).append(receipt.by(self.key))
        return index

    def round(self, number: int, run: str = RUN, terms: Terms = TERMS) -> None:
        """An honest round of all sites."""
        rows = []
        for site in self.sites:
            self.train(site, run, number, terms)
            rows.append(self.row(site, run, number, terms))
        self.commit(run, number, rows)

    def close(self) -> None:
        """Every site takes its last receipts and cosigns."""
        for site in self.sites:
            self.show(site)

    def drawn(self, keys: Sequence[SigningKey], run: str = RUN) -> tuple[str, list[str]]:
        """A draw of one group; its name and who is in it."""
        nonces = {k.verify_key.id.hex(): os.urandom(32) for k in keys}
        made = {i: commit(run, nonces[i], 1000, k) for k in keys for i in [k.verify_key.id.hex()]}
        shown = {i: reveal(run, 3, nonces[i], made, k) for k in keys for i in [k.verify_key.id.hex()]}
        draw = Transcript(run, 3, made, shown)
        self.draws[draw.digest] = draw.as_dict()
        self.masks = digest(canonical(sorted(made)))
        return draw.digest, sorted(made)

    @property
    def bundle(self) -> Bundle:
        """Everything, as it is now."""
        sites = {site.id: site.log for site in self.sites}
        note = self.head.signed(self.key)
        return Bundle(1.0, tuple(self.leaves), note, dict(self.cosigned), sites, {}, dict(self.draws), dict(self.heads))

    def trust(self, *more: Checkpoint) -> Trust:
        """Every key, and the log's first two leaves remembered."""
        early = head_of(self.origin, [leaf.record for leaf in self.leaves[:2]])
        return trust_of("fed", self.key.verify_key, self.trusted, [early, *more], "site site-2")


def found(got: Audit) -> set[tuple[str, str]]:
    """What an audit found: kinds and codes."""
    return {(f.kind, f.code) for f in got.findings.found}


def check(made: Forged) -> set[tuple[str, str]]:
    """What is found once every site has its last receipts."""
    made.close()
    return found(audit(made.bundle, made.trust()))


def began(rounds: int = 2, sites: int = 3) -> Forged:
    """Honest rounds of some sites."""
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, sites + 1)))
    made.begin()
    for number in range(1, rounds + 1):
        made.round(number)
    return made


def lines(bundle: Bundle, trust: Trust, question: str) -> str:
    """A report's answer to a question."""
    got = audit(bundle, trust)
    said = answers(bundle, got.trust, got.history, got.ledgers, got.blocks, got.findings)
    return "\n".join(line for one in said if question in one.question for line in one.lines)


def again(made: Forged) -> tuple[ForgedSite, ForgedSite]:
    """The first site is put out and comes again with another key and another log; the old one and the new one."""
    old = made.sites[0]
    made.leaf("revoke", site=old.name)
    made.cosigned.pop(old.id, None)
    new = ForgedSite(old.name, origin="cloister/site/" + "ab" * 16)
    made.sites = (new, *made.sites[1:])
    made.enrol(new)
    return old, new


def by_key(made: Forged, *without: str) -> Trust:
    """As a site writes it of its peers: keys alone, but for its own."""
    known = made.trust()
    names = {i: n if n == "site-2" else i[:16] for i, n in known.names.items() if i not in without}
    return replace(known, names=names, sites={i: key for i, key in known.sites.items() if i not in without})

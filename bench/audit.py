"""What an audit costs: a thousand rounds of fifty sites, told in the federation's log and in every site's own, on one core.

No two sites have as much text, so that each has a sample rate, and a history, of its own.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from cloister_shared.audit import accountant
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.cards import SITE_PURPOSE, SiteCard
from cloister_shared.encoding import canonical
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SigningKey
from cloister_shared.witness import log_of_federation, log_of_site
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SITES, ROUNDS = 50, 1000


def make(sites: int = SITES, rounds: int = ROUNDS) -> tuple[Bundle, SigningKey, list[SigningKey]]:
    """A bundle: every site reserves and spends in every round, and each commit holds each site's head and its epsilon."""
    keeper, keys = SigningKey.generate(), [SigningKey.generate() for _ in range(sites)]
    origin, run, clients = log_of_federation(keeper.verify_key), "ab" * 16, [k.verify_key.id.hex() for k in keys]
    own = [log_of_site(i.to_bytes(2, "big")) for i in range(sites)]
    bodies: list[dict[str, Any]] = [
        {"kind": "enrol", "site": f"site-{i}", "card": _card(f"site-{i}", key)} for i, key in enumerate(keys)
    ]
    bodies.append({"kind": "policy", "run": run, "adapter": f"{0:064x}", "base": "cd" * 32})
    rates = [0.005 * 1.01**i for i in range(sites)]
    published = [_published(rate, rounds) for rate in rates]
    # What was worked out for them is forgotten before the audit.
    accountant.forget()
    events, trees = [list[bytes]() for _ in keys], [Tree() for _ in keys]
    for number in range(1, rounds + 1):
        asked = list[dict[str, Any]]()
        for i, key in enumerate(keys):
            terms: dict[str, Any] = {"noise_multiplier": 1.1, "sample_rate": rates[i], "steps": 10, "delta": 1e-5}
            terms["plan"] = f"{number * sites + i:064x}"
            facts = {"event": "reserve", "at": 1.0, "cap": 8.0, "noised": [], "run": run, "round": number}
            facts |= terms | {"base": "cd" * 32, "entry": number, "blocks": [1], "admitted": [1.0], "secure": ""}
            spent = {"event": "spend", "entry": number, "update": "ef" * 32, "vector": "ef" * 32, "at": 1.0}
            for event in (facts, spent):
                events[i].append(canonical(event))
                trees[i].append(leaf_hash(events[i][-1]))
            head = Checkpoint(own[i], len(trees[i]), trees[i].root()).signed(key)
            told = {"client": clients[i], "name": f"site-{i}", "verdict": "accepted", "update": "ef" * 32, "charged": 1}
            asked.append(terms | told | {"epsilon": published[i][number - 1], "head": head})
        commit = {
            "kind": "round_commit",
            "run": run,
            "round": number,
            "base": "cd" * 32,
            "sums": [],
            "draw": "",
            "attempt": 1,
        }
        commit |= {"start": f"{number - 1:064x}", "adapter": f"{number:064x}", "metrics": {}}
        bodies.append(commit | {"clients": asked})
    leaves, log = list[SignedLeaf](), Tree()
    for index, body in enumerate(bodies):
        record = canonical({"log": origin, "index": index, "at": float(index)} | body)
        leaves.append(SignedLeaf(record, keeper.verify_key.id.hex(), keeper.sign("log-leaf", record).hex()))
        log.append(leaf_hash(record))
    head_of, logs = Checkpoint(origin, len(bodies), log.root()), dict[str, SiteLog]()
    seen = {"event": "witness", "at": 1.0, "log": origin, "size": head_of.size, "root": head_of.root.hex(), "note": ""}
    for i, key in enumerate(keys):
        events[i].append(canonical(seen))
        trees[i].append(leaf_hash(events[i][-1]))
        logs[clients[i]] = SiteLog(tuple(events[i]), Checkpoint(own[i], len(trees[i]), trees[i].root()).signed(key))
    cosigned = {clients[0]: (head_of.size, head_of.root.hex(), head_of.cosigned(clients[0], keys[0], 1))}
    return Bundle(1.0, tuple(leaves), head_of.signed(keeper), cosigned, logs), keeper, keys


def _published(rate: float, rounds: int) -> list[float]:
    """What an honest coordinator publishes, a little above the truth; between every tenth round by a line, which is as near as that."""
    exact = [n for n in range(1, rounds + 1) if n < 30 or n % 10 == 0]
    known = [accountant.by_pld((((1.1, rate), 10 * n),), 1e-5) + 0.005 for n in exact]
    return [float(one) for one in np.interp(range(1, rounds + 1), exact, known)]


def _card(name: str, key: SigningKey) -> dict[str, Any]:
    node = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = node.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    sealing = OpeningKey.generate().sealing_key.raw.hex()
    card = SiteCard(name, key.verify_key.raw.hex(), sealing, pem, 1000, "record", 8.0, 1e-5)
    return card.body | {"signature": key.sign(SITE_PURPOSE, canonical(card.body)).hex()}


def measure() -> float:
    """Seconds of CPU."""
    bundle, keeper, keys = make()
    known = {key.verify_key.id.hex(): (f"site-{i}", key.verify_key) for i, key in enumerate(keys)}
    trust = trust_of("bench", keeper.verify_key, known, [])
    started = time.process_time()
    done = audit(bundle, trust)
    seconds = time.process_time() - started
    if [f for f in done.findings.found if f.code not in ("nothing-remembered", "no-receipt")]:
        raise SystemExit(f"the audit found something: {done.findings.found[:3]}")
    return seconds


def figures(seconds: float) -> list[tuple[str, str, str]]:
    """Lines for the table."""
    return [
        (
            f"offline audit of {2 * SITES * ROUNDS:,} records, {ROUNDS:,} rounds of {SITES} sites of as many sizes",
            f"{seconds:.1f} s",
            "< 30 s",
        )
    ]


if __name__ == "__main__":
    for name, value, target in figures(measure()):
        print(f"{name:75} {value:>10}   {target}")

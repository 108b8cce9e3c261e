"""What an audit costs: verifying a federation's log of 100,000 signed leaves and a site's log of as many events, on one core."""

from __future__ import annotations

import time

from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.encoding import canonical
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.witness import log_of_federation, log_of_site

RECORDS = 100_000


def make(count: int = RECORDS) -> tuple[Bundle, SigningKey, SigningKey]:
    """A bundle: half of its records are the federation's leaves, half one site's events; sixty rounds among them."""
    keeper, site = SigningKey.generate(), SigningKey.generate()
    origin, client = log_of_federation(keeper.verify_key), site.verify_key.id.hex()
    leaves, half = list[SignedLeaf](), count // 2
    for index in range(half):
        body = {"what": "nothing", "run": "ab" * 16, "round": index}
        record = canonical({"log": origin, "index": index, "kind": "incident", "at": float(index)} | body)
        leaves.append(SignedLeaf(record, keeper.verify_key.id.hex(), keeper.sign("log-leaf", record).hex()))
    tree = Tree(leaf_hash(leaf.record) for leaf in leaves)
    head = Checkpoint(origin, half, tree.root())
    events = list[bytes]()
    for entry in range(1, 61):
        facts = {"run": "ab" * 16, "round": entry, "plan": f"{entry:064x}", "base": "cd" * 32, "steps": 10}
        facts |= {
            "noise_multiplier": 1.1,
            "sample_rate": 0.01,
            "entry": entry,
            "blocks": [1],
            "admitted": [1.0],
            "secure": "",
        }
        events.append(canonical({"event": "reserve", "at": 1.0, "cap": 8.0, "delta": 1e-5, "noised": []} | facts))
        events.append(
            canonical({"event": "spend", "entry": entry, "update": "ef" * 32, "vector": "ef" * 32, "at": 1.0})
        )
    while len(events) < half:
        events.append(
            canonical({"event": "witness", "at": 1.0, "log": origin, "size": half, "root": head.root.hex(), "note": ""})
        )
    own = log_of_site(b"bench")
    note = Checkpoint(own, len(events), Tree(leaf_hash(e) for e in events).root()).signed(site)
    cosigned = {client: (half, head.root.hex(), head.cosigned(client, site, 1))}
    bundle = Bundle(1.0, tuple(leaves), head.signed(keeper), cosigned, {client: SiteLog(tuple(events), note)})
    return bundle, keeper, site


def measure() -> float:
    """Seconds of CPU."""
    bundle, keeper, site = make()
    trust = trust_of("bench", keeper.verify_key, {site.verify_key.id.hex(): ("site", site.verify_key)}, [])
    started = time.process_time()
    done = audit(bundle, trust)
    seconds = time.process_time() - started
    if [f for f in done.findings.found if f.code != "nothing-remembered"]:
        raise SystemExit(f"the audit found something: {done.findings.found[:3]}")
    return seconds


def figures(seconds: float) -> list[tuple[str, str, str]]:
    """Lines for the table."""
    return [(f"offline audit of {RECORDS:,} signed records", f"{seconds:.1f} s", "< 30 s")]


if __name__ == "__main__":
    for name, value, target in figures(measure()):
        print(f"{name:75} {value:>10}   {target}")

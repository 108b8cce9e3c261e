"""What an audit costs: verifying a federation's log of 100,000 signed leaves and a site's log of as many events, on one core."""

from __future__ import annotations

import time
from typing import Any

from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.encoding import canonical
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.witness import log_of_federation, log_of_site

RECORDS, ROUNDS = 100_000, 60


def make(count: int = RECORDS) -> tuple[Bundle, SigningKey, SigningKey]:
    """A bundle: half of its records are the federation's leaves, half one site's events; sixty rounds, told in both."""
    keeper, site = SigningKey.generate(), SigningKey.generate()
    origin, client, own = log_of_federation(keeper.verify_key), site.verify_key.id.hex(), log_of_site(b"bench")
    half, run, events, bodies = count // 2, "ab" * 16, list[bytes](), list[dict[str, Any]]()
    bodies.append({"kind": "enrol", "site": "site", "card": {"key": site.verify_key.raw.hex(), "name": "site"}})
    bodies.append({"kind": "policy", "run": run, "adapter": f"{0:064x}", "base": "cd" * 32})
    tree = Tree()
    for entry in range(1, ROUNDS + 1):
        terms = {"noise_multiplier": 1.1, "sample_rate": 0.01, "steps": 10, "delta": 1e-5, "plan": f"{entry:064x}"}
        facts = {"event": "reserve", "at": 1.0, "cap": 8.0, "noised": [], "run": run, "round": entry, "base": "cd" * 32}
        facts |= terms | {"entry": entry, "blocks": [1], "admitted": [1.0], "secure": ""}
        spent = {"event": "spend", "entry": entry, "update": "ef" * 32, "vector": "ef" * 32, "at": 1.0}
        for event in (facts, spent):
            events.append(canonical(event))
            tree.append(leaf_hash(events[-1]))
        head = Checkpoint(own, len(tree), tree.root()).signed(site)
        asked = terms | {"client": client, "name": "site", "verdict": "accepted", "update": "ef" * 32, "charged": 1}
        commit = {"kind": "round_commit", "run": run, "round": entry, "base": "cd" * 32, "sums": [], "draw": ""}
        commit |= {"start": f"{entry - 1:064x}", "adapter": f"{entry:064x}", "metrics": {}}
        bodies.append(commit | {"clients": [asked | {"epsilon": 8.0, "head": head}]})
    bodies += [{"kind": "incident", "what": "nothing", "run": run, "round": n} for n in range(half - len(bodies))]
    leaves, log = list[SignedLeaf](), Tree()
    for index, body in enumerate(bodies):
        record = canonical({"log": origin, "index": index, "at": float(index)} | body)
        leaves.append(SignedLeaf(record, keeper.verify_key.id.hex(), keeper.sign("log-leaf", record).hex()))
        log.append(leaf_hash(record))
    head_of = Checkpoint(origin, half, log.root())
    seen = {"event": "witness", "at": 1.0, "log": origin, "size": half, "root": head_of.root.hex(), "note": ""}
    events += [canonical(seen)] * (half - len(events))
    note = Checkpoint(own, len(events), Tree(leaf_hash(e) for e in events).root()).signed(site)
    cosigned = {client: (half, head_of.root.hex(), head_of.cosigned(client, site, 1))}
    bundle = Bundle(1.0, tuple(leaves), head_of.signed(keeper), cosigned, {client: SiteLog(tuple(events), note)})
    return bundle, keeper, site


def measure() -> float:
    """Seconds of CPU."""
    bundle, keeper, site = make()
    trust = trust_of("bench", keeper.verify_key, {site.verify_key.id.hex(): ("site", site.verify_key)}, [])
    started = time.process_time()
    done = audit(bundle, trust)
    seconds = time.process_time() - started
    if [f for f in done.findings.found if f.code not in ("nothing-remembered", "no-receipt")]:
        raise SystemExit(f"the audit found something: {done.findings.found[:3]}")
    return seconds


def figures(seconds: float) -> list[tuple[str, str, str]]:
    """Lines for the table."""
    return [(f"offline audit of {RECORDS:,} signed records", f"{seconds:.1f} s", "< 30 s")]


if __name__ == "__main__":
    for name, value, target in figures(measure()):
        print(f"{name:75} {value:>10}   {target}")

"""``python -m bench.attacked``: the tables of attacks and rules out of ``bench/results/attacks.jsonl``, one for each world.

The lines are made by ``cloister attack --out bench/results/attacks.jsonl`` (README has the worlds); this runs nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cloister.attack_command import success

RESULTS = Path("bench/results")


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown: accuracy, what the attack reached, honest sites without weight; by attack and rule."""
    out = []
    worlds = dict.fromkeys((r["alpha"], r["epsilon"], r["sites"], r["attackers"], r["rounds"]) for r in found)
    for alpha, epsilon, sites, attackers, rounds in worlds:
        mine = {
            (r["attack"], r["rule"]): r
            for r in found
            if (r["alpha"], r["epsilon"], r["sites"], r["attackers"], r["rounds"])
            == (alpha, epsilon, sites, attackers, rounds)
        }
        rules = list(dict.fromkeys(rule for _, rule in mine))
        private = f"epsilon {epsilon:g}" if epsilon else "no DP"
        out.append(f"\n{attackers} of {sites} sites hostile, Dirichlet {alpha:g}, {private}, {rounds} rounds:\n")
        out += [f"| attack | {' | '.join(rules)} |", "|---" * (len(rules) + 1) + "|"]
        for attack in dict.fromkeys(attack for attack, _ in mine):
            cells = [_cell(mine.get((attack, rule)), mine.get(("none", rule))) for rule in rules]
            out.append(f"| {attack} | {' | '.join(cells)} |")
    return "\n".join(out).lstrip("\n") + "\n"


def _cell(got: dict[str, Any] | None, clean: dict[str, Any] | None) -> str:
    if got is None:
        return ""
    reached = success(got, clean)
    told = "" if math.isnan(reached) or got["attack"] == "none" else f" ({reached:.2f})"
    refused = f" −{got['refused']:g}" if got["refused"] else ""
    held = " held" if got["held"] else ""
    return f"{got['accuracy']:.3f}{told}{refused}{held}"


def main() -> None:
    """Writes and prints."""
    found = [json.loads(line) for line in (RESULTS / "attacks.jsonl").read_text().splitlines()]
    (RESULTS / "attacks.md").write_text(tables(found))
    print(tables(found))


if __name__ == "__main__":
    main()

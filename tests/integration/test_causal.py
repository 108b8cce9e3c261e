"""Causal language modelling in a real federation: perplexity on the coordinator's text falls over rounds."""

from __future__ import annotations

from pathlib import Path

from support.federation import bring_up, make_federation, wait_for


def test_perplexity_falls(tiny_gpt2: Path) -> None:
    with make_federation(tiny_gpt2, sites=2, rounds=3, steps=10, task="causal-lm") as federation:
        bring_up(federation)
        run = federation.start("run", "run", str(federation.settings))
        wait_for("the run to end", lambda: run.poll() is not None)
        assert run.returncode == 0, federation.text("run")
        rounds = federation.done("rounds", "list")["rounds"]
        perplexity = [r["metrics"]["perplexity"] for r in rounds[1:]]
        assert perplexity[2] < perplexity[1] < perplexity[0]
        assert perplexity[2] < 0.97 * perplexity[0]

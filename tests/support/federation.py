"""A real federation on loopback for integration tests: the commands a person would type, as processes."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cloister_shared.processes import free_port

PATIENCE = 180.0
LABELS = ("billing", "delivery", "login")
_WORDS = {
    "billing": "card charged twice refund invoice",
    "delivery": "parcel courier arrived order not",
    "login": "login app password crashes screen",
}


def wait_for(what: str, found: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Polls until ``found`` returns something true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def make_text(path: Path, count: int, seed: int, marker: str) -> None:
    """Writes ``count`` labelled records, each with ``marker`` in it."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(LABELS)
        words = rng.choices(_WORDS[label].split(), k=4) + rng.choices(["the", "a", "my", "is", "please", "help"], k=3)
        rows.append(json.dumps({"text": f"{marker} {' '.join(words)}", "label": label}) + "\n")
    path.write_text("".join(rows))


@dataclass
class Federation:
    """A federation in a temporary folder."""

    home: Path
    settings: Path
    sites: tuple[str, ...]
    runtime: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The processes' environment."""
        return os.environ | {
            "CLOISTER_HOME": str(self.home),
            "CLOISTER_RUNTIME": str(self.runtime),
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Runs ``cloister`` to its end, with ``typed`` on its standard input."""
        return subprocess.run(
            [sys.executable, "-m", "cloister.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            input=typed,
        )

    def done(self, *arguments: str, typed: str = "") -> dict[str, Any]:
        """Runs ``cloister --json`` to its end, which must be good; its last JSON line."""
        result = self.command("--json", *arguments, typed=typed)
        assert result.returncode == 0, result.stdout + result.stderr
        record: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return record

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts ``cloister --json`` with its output in a log."""
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cloister.cli", "--json", *arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        return process

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Events of a kind in a process's log."""
        log = self.home / f"{name}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return [r for r in records if r.get("event") == kind]

    def text(self, name: str) -> str:
        """A process's whole log."""
        return (self.home / f"{name}.log").read_text()

    def status(self, site: str) -> dict[str, Any]:
        """A site's own status."""
        try:
            record: dict[str, Any] = json.loads((self.home / "sites" / site / "agent" / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return record

    def stop(self) -> None:
        """Stops everything."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_PUBLIC = """[public]
path = "public.jsonl"
text = "text"
label = "label"
"""


_SECURE = """[secure_aggregation]
group = 4
"""


_REGISTRY = """[registry]
address = "127.0.0.1:{}"
enrolment = "127.0.0.1:{}"
certificate_hours = 0.02
"""


@contextmanager
def make_federation(
    base: Path,
    *,
    sites: int = 3,
    rounds: int = 2,
    steps: int = 2,
    task: str = "text-classification",
    deadline: int = 60,
    least: int = 2,
    noise: float = 0.8,
    secure: bool = False,
    tokens: bool = False,
    storage: str = "",
) -> Iterator[Federation]:
    """Creates coordinator and sites by the commands of the README, and stops everything at the end."""
    with tempfile.TemporaryDirectory(prefix="clst", dir="/tmp") as folder:
        root = Path(folder)
        home, runtime = root / "home", root / "r"
        home.mkdir()
        runtime.mkdir(mode=0o755)
        classify = task == "text-classification"
        make_text(root / "held-out.jsonl", 60, 99, "heldout")
        make_text(root / "public.jsonl", 12, 98, "public")
        labels = f"labels = {json.dumps(list(LABELS))}" if classify else ""
        settings = root / "federation.toml"
        settings.write_text(
            f"""name = "lab"
address = "127.0.0.1:{free_port()}"
base = {json.dumps(str(base))}
[task]
kind = "{task}"
{labels}
max_tokens = 32
target_modules = [{'"query", "value"' if classify else '"c_attn"'}]
rank = 4
[training]
rounds = {rounds}
steps = {steps}
batch = 20
adapter_rate = {1e-3 if classify else 1e-2}
[privacy]
noise_multiplier = {noise}
[round]
deadline_seconds = {deadline}
min_clients = {least}
[held_out]
path = "held-out.jsonl"
text = "text"
{'label = "label"' if classify else ""}
{_PUBLIC if classify else ""}
{_SECURE if secure else ""}
{_REGISTRY.format(free_port(), free_port()) if tokens else ""}
{storage}"""
        )
        names = tuple(f"site-{i + 1}" for i in range(sites))
        federation = Federation(home, settings, names, runtime)
        federation.done("coordinator", "init", str(settings))
        if tokens:
            federation.start("coordinator", "coordinator", "up")
            wait_for("the coordinator to be ready", partial(_settled, federation, "coordinator"))
        for i, name in enumerate(names):
            make_text(root / f"{name}.jsonl", 60 + i, i, f"secretmarker{name.replace('-', '')}")
            text = ("--data", str(root / f"{name}.jsonl"), "--records", "60", "--epsilon-cap", "1000")
            if tokens:
                token = str(federation.done("coordinator", "invite", name)["token"])
                federation.done("site", "enrol", "-", *text, typed=token + "\n")
                continue
            federation.done("site", "enrol", name, "--coordinator", str(home / "coordinator" / "card.json"), *text)
            federation.done("coordinator", "admit", str(home / "sites" / name / "card.json"))
        cards = {name: str(home / "sites" / name / "card.json") for name in names}
        for name in names if secure else ():
            for other, card in cards.items():
                if other != name:
                    federation.done("site", "peer", card, "--site", name)
        try:
            yield federation
        finally:
            federation.stop()


def _settled(federation: Federation, name: str) -> bool:
    return bool(federation.events(name, "ready")) or federation.processes[name].poll() is not None


def bring_up(federation: Federation) -> None:
    """Starts SuperLink and all sites, and waits for them."""
    if "coordinator" not in federation.processes:
        federation.start("coordinator", "coordinator", "up")
    for name in federation.sites:
        federation.start(name, "site", "up", name)
    for name in ("coordinator", *federation.sites):
        wait_for(f"{name} to be ready", partial(_settled, federation, name))
        assert federation.processes[name].poll() is None, federation.text(name)


def superlink_bytes(federation: Federation) -> bytes:
    """Everything that SuperLink's database holds now, write-ahead log included."""
    source = sqlite3.connect(f"file:{federation.home / 'coordinator' / 'superlink.db'}?mode=ro", uri=True)
    copy = sqlite3.connect(":memory:")
    try:
        source.backup(copy)
        return copy.serialize()
    finally:
        source.close()
        copy.close()

"""The whole demo as processes: seconds, summed memory, the platform's own overhead of a round, bytes on the wire."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record


def measure() -> dict[str, Any]:
    """Runs ``cloister demo --json`` and watches it.

    Returns:
        Seconds of the whole, peak of summed RSS (shared pages counted in each process), peak RSS of a relay, and per round its
        seconds, the slowest site's own seconds and the difference.
    """
    with tempfile.TemporaryDirectory(prefix="clst", dir="/tmp") as folder:
        home = Path(folder) / "home"
        started = time.monotonic()
        with (Path(folder) / "out").open("wb") as out:
            command = [sys.executable, "-m", "cloister.cli", "--home", str(home), "--json", "demo"]
            demo = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            peak = relay = 0
            own: dict[tuple[int, str], float] = {}
            while demo.poll() is None:
                total = 0
                for process in [demo, *demo.children(recursive=True)]:
                    try:
                        rss = process.memory_info().rss
                        total += rss
                        if "cloister_client.relay" in process.cmdline():
                            relay = max(relay, rss)
                    except (psutil.NoSuchProcess, psutil.ZombieProcess):
                        continue
                peak = max(peak, total)
                for path in home.glob("sites/*/agent/status.json"):
                    status = _read(path)
                    if status.get("state") == "ready" and status.get("round"):
                        own[status["round"], status["site"]] = status["seconds"]
                time.sleep(0.25)
        seconds = time.monotonic() - started
        lines = (Path(folder) / "out").read_text().splitlines()
        if demo.returncode:
            raise SystemExit("\n".join(lines[-5:]))
        events = [json.loads(line) for line in lines if line.startswith("{")]
        report = next(e for e in events if e["event"] == "report")
        size = 4 * next(e for e in events if e["event"] == "run")["parameters"]
        rounds = []
        for row in report["rounds"][1:]:
            slowest = max(value for (number, _), value in own.items() if number == row["round"])
            rounds.append(
                {
                    "round": row["round"],
                    "seconds": row["seconds"],
                    "slowest_site": slowest,
                    "overhead": row["seconds"] - slowest,
                }
            )
        wire = max(r["received_bytes"] / r["participants"] / size for r in report["rounds"][1:])
        return {
            "seconds": seconds,
            "peak_rss": peak,
            "relay_rss": relay,
            "rounds": rounds,
            "wire_ratio": wire,
            "adapter_bytes": size,
            "metrics": report["rounds"][-1]["metrics"],
            "judging_seconds": report["rounds"][-1]["judging_seconds"],
        }

"""The demo as a user runs it, small: own data, two sites, one round."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.federation import make_text


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder to work in."""
    with tempfile.TemporaryDirectory(prefix="clst", dir="/tmp") as name:
        yield Path(name)


def _cloister(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloister.cli", *arguments], cwd=folder, capture_output=True, text=True, timeout=400
    )


def test_demo_on_own_data_and_what_follows(folder: Path) -> None:
    make_text(folder / "mine.jsonl", 120, 1, "mine")
    done = _cloister(
        folder,
        "demo",
        "--data",
        "mine.jsonl",
        "--sites",
        "2",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--batch",
        "16",
        "--partition",
        "dirichlet:5",
        "--epsilon",
        "8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Rounds of run" in done.stdout
    assert "committed" in done.stdout
    assert "The sites' own ledgers: site-1" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert (folder / ".cloister" / "export" / "adapter_model.safetensors").is_file()
    for command in (("rounds", "show", "1"), ("site", "status"), ("rounds", "export", "1")):
        after = _cloister(folder, "--json", *command)
        assert after.returncode == 0, after.stderr
        json.loads(after.stdout.splitlines()[-1])
    # A second demo replaces the first and says so; something else is never touched.
    (folder / "other").mkdir()
    (folder / "other" / "file").write_text("mine")
    refused = _cloister(folder, "--home", "other", "demo")
    assert refused.returncode == 2
    assert (folder / "other" / "file").read_text() == "mine"
    assert refused.stderr.startswith("error: other: there is something here that no demo made")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n', "row 1: label field 'label' is missing"),
        (b"", "the file holds no records"),
        (b'{"text": "a", "label": "x"}\n{"text": "' + b"a" * 10_000_000 + b'", "label": "x"}\n', "row 2: row too long"),
        (b'{"text": "a", "label": "x"}\n\xff\xfe{"text"\n', "row 2: row is not UTF-8"),
        (b'{"text": "a", "label": "x"}\nnot json\n', "row 2: row is not JSON"),
    ],
    ids=["missing field", "empty", "10 MB row", "not UTF-8", "not JSON"],
)
def test_bad_text_is_one_line_and_leaves_nothing(folder: Path, content: bytes, expected: str) -> None:
    (folder / "bad.jsonl").write_bytes(content)
    done = _cloister(folder, "demo", "--data", "bad.jsonl", "--sites", "2")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "bad.jsonl" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / ".cloister").exists()

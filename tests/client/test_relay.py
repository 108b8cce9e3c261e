"""The relay checks bundles by hash and carries neither torch nor an accountant."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from cloister_client.relay import check_bundle
from cloister_shared.errors import VerificationError

BUNDLE = b"a bundle without code"
GOOD = hashlib.sha256(BUNDLE).hexdigest()


def test_only_an_allowed_bundle_passes() -> None:
    check_bundle(BUNDLE, (GOOD,))
    check_bundle(BUNDLE, ("00" * 32, GOOD))


@pytest.mark.parametrize("allowed", [(), ("00" * 32,), (GOOD[:-1],), (GOOD.upper(),)])
def test_another_bundle_is_refused(allowed: tuple[str, ...]) -> None:
    with pytest.raises(VerificationError, match="bundle is not allowed") as refused:
        check_bundle(BUNDLE, allowed)
    assert refused.value.got == GOOD[:16]


@pytest.mark.parametrize("content", [b"", BUNDLE + b"\0", BUNDLE[:-1]])
def test_a_changed_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(VerificationError):
        check_bundle(content, (GOOD,))


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str] | int]:
    """What a process holds that has imported the relay."""
    script = (
        "import cloister_client.relay, json, psutil, sys\n"
        "print(json.dumps({'modules': sorted({m.split('.')[0] for m in sys.modules}),"
        " 'rss': psutil.Process().memory_info().rss}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, list[str] | int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "peft", "opacus", "dp_accounting", "tokenizers", "safetensors", "cloister_server"]
)
def test_the_relay_does_not_import(imported: dict[str, list[str] | int], name: str) -> None:
    modules = imported["modules"]
    assert isinstance(modules, list)
    assert "cloister_client" in modules
    assert name not in modules


def test_the_relay_is_small(imported: dict[str, list[str] | int]) -> None:
    rss = imported["rss"]
    assert isinstance(rss, int)
    assert 10e6 < rss < 200e6

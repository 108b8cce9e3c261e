"""The config-only Flower bundle: no code in it, and its hash is what a site allows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cloister_shared
from cloister_shared.errors import StateError
from flwr.cli.build import build_fab_from_disk


def app_folder() -> Path:
    """The bundle's folder: inside the installed package, or in the checkout.

    Raises:
        StateError: Neither is there.
    """
    package = Path(cloister_shared.__file__).parent
    for folder in (package / "app", package.parents[1] / "deploy" / "app"):
        if (folder / "pyproject.toml").is_file():
            return folder
    raise StateError("the Flower bundle is missing", where=str(package), mend="reinstall cloister")


def build_bundle() -> tuple[bytes, str]:
    """Builds the bundle: its bytes and their SHA-256, hex. The same folder always gives the same bytes."""
    content = build_fab_from_disk(app_folder())
    return content, hashlib.sha256(content).hexdigest()

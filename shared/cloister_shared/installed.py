"""Which code this is: a digest of our own sources as they are installed, and of the lock file that its dependencies were taken from."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import cloister_shared
from cloister_shared import __version__
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import StateError

PACKAGES = ("cloister", "cloister_client", "cloister_flower", "cloister_model", "cloister_server", "cloister_shared")
LOCK = "requirements.lock"


@lru_cache(maxsize=1)
def code_version() -> str:
    """Version and SHA-256 over all Python files of our packages that are installed, by name."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in map(Path, () if spec is None else spec.submodule_search_locations or ()):
            for path in folder.rglob("*.py"):
                found[f"{package}/{path.relative_to(folder).as_posix()}"] = digest(path.read_bytes())
    return f"cloister {__version__} sha256:{digest(canonical(found))}"


def lock_file() -> Path:
    """The lock file: inside the installed package, or in the checkout.

    Raises:
        StateError: Neither is there.
    """
    package = Path(cloister_shared.__file__).parent
    for path in (package / LOCK, package.parents[1] / LOCK):
        if path.is_file():
            return path
    raise StateError("the lock file is missing", where=str(package), mend="reinstall cloister")


@lru_cache(maxsize=1)
def lock_digest() -> str:
    """SHA-256 of the lock file, hex. torch is not in it: its builds differ by machine."""
    return digest(lock_file().read_bytes())

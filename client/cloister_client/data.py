"""A site's registered text: adding it to the ledger, and reading what may be trained on.

Registering reads a file once, checks every row, and names its units under the site's key. At the agent's start the registered files are
read again and rows whose unit is not registered are left out and counted for the owner. Paths come from the owner alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cloister_model.text import Source, read
from cloister_shared.cards import CoordinatorCard
from cloister_shared.errors import InputError
from cloister_shared.signing import read_secret

from cloister_client.budget import Ledger
from cloister_client.policy import Policy, read_policy
from cloister_client.site import Site
from cloister_client.units import Units, select, tag, text_tag


@dataclass(frozen=True)
class Added:
    """What registering a file found; all private.

    Attributes:
        records: Records in the file.
        units: Units that they make.
        new: Units that were not known.
        block: The block of the new ones, made also where there are none.
    """

    records: int
    units: int
    new: int
    block: str


def open_ledger(site: Site, policy: Policy | None = None) -> Ledger:
    """The site's ledger under its policy.

    Raises:
        CloisterError: Policy or ledger cannot be used; exit code 3 where the ledger is not the newest.
    """
    limits = (policy or read_policy(site.home / "policy.toml")).limits
    return Ledger(site.agent_home / "ledger.db", site.counter, limits)


def _labels(card: CoordinatorCard) -> tuple[str, ...] | None:
    return card.labels if card.task == "text-classification" else None


def add(site: Site, source: Source, block: str = "", *, as_new: bool = False) -> Added:
    """Registers a file of text; for ``as_new`` see ``Ledger.register``.

    Raises:
        InputError: A row is not as it must be, or the unit is another than this site's.
    """
    key = read_secret(site.agent_home / "unit.key", 32)
    names: list[bytes] = []
    texts: dict[bytes, set[bytes]] = {}
    for record in read(source, _labels(site.coordinator())):
        names.append(tag(key, record))
        texts.setdefault(names[-1], set()).add(text_tag(key, record))
    made, new = open_ledger(site).register(source, names, block, texts if source.unit else None, as_new)
    return Added(len(names), len(set(names)), new, made)


def remove(site: Site, path: Path) -> None:
    """Stops reading a file; its units stay known, with their spend.

    Raises:
        InputError: It is not registered.
    """
    ledger = open_ledger(site)
    if not ledger.forget(path):
        registered = ", ".join(str(source.path) for source in ledger.sources())
        raise InputError("the file is not registered", where=str(path), expected=registered or "one that is")


def load(site: Site, ledger: Ledger) -> Units:
    """Reads the registered text.

    Raises:
        InputError: Nothing is registered, or a file cannot be read.
    """
    sources = ledger.sources()
    if not sources:
        raise InputError(
            "no text is registered", where=str(site.home), mend=f"cloister site data add --site {site.name} FILE"
        )
    for source in sources:
        if not source.path.is_file():
            raise InputError(
                "cannot read the file",
                where=str(source.path),
                got="no such file",
                mend=f"put it back, or: cloister site data remove --site {site.name} {source.path}",
            )
    labels = _labels(site.coordinator())
    key = read_secret(site.agent_home / "unit.key", 32)
    # Rows that are no records are left out, and none need be left: an agent that does not start would say so to everybody.
    odd: list[InputError] = []
    found = (record for source in sources for record in read(source, labels, odd.append))
    units = select(key, found, ledger.units())
    return replace(units, unregistered=units.unregistered + len(odd))

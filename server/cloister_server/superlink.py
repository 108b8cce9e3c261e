"""This federation's SuperLink, as a process of ``coordinator up``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cloister_shared.cards import split_address
from cloister_shared.errors import CloisterError
from cloister_shared.processes import die_with_parent

from cloister_server.coordinator import open_coordinator


def main() -> None:
    """``python -m cloister_server.superlink --home COORDINATOR``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    home: Path = parser.parse_args().home
    die_with_parent()
    os.environ["FLWR_HOME"] = str(home / "flwr")
    from cloister_flower.superlink import serve

    try:
        coordinator = open_coordinator(home)
        host, port = split_address(coordinator.card.address, "address")
        serve(host, port, home / "tls", home / "superlink.db", coordinator.secret, coordinator.token)
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

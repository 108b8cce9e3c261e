"""This site's SuperNode: carries ciphertext between SuperLink and relay, holds no key of ours.

Run by ``site up``, which starts it again when it ends (a SuperNode that comes back within a minute is refused at first).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cloister_shared.errors import CloisterError
from cloister_shared.processes import die_with_parent
from cloister_shared.signing import read_secret

from cloister_client.site import read_site


def main() -> None:
    """``python -m cloister_client.supernode --home SITE``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    site = read_site(parser.parse_args().home)
    die_with_parent()
    link = site.link_home
    os.environ["FLWR_HOME"] = str(link / "flwr")
    from cloister_flower.supernode import serve

    card = site.coordinator()
    try:
        serve(
            card.address,
            card.ca.encode(),
            link / "node.key",
            link / "tls",
            site.runtime_port,
            read_secret(link / "superexec.secret"),
        )
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

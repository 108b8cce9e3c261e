"""The one adapter over Flower 1.41.0's internals: frames in messages, tasks, the bundle, pace. No torch, no keys, no text.

Everything private to flwr that Cloister relies on is named in this package and held by contract tests.
"""

from __future__ import annotations

import os

# Read by flwr when it is imported: before anything else here.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

FLWR_VERSION = "1.41.0"
POLL_SECONDS = 0.1

"""What it costs to let updates in: sealing, opening and admitting one of a million numbers, and a robust rule beside Flower's Krum."""

from __future__ import annotations

import os
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from cloister_server.admission import admit_update
from cloister_server.robust import combine
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, open_envelope, seal
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TrainingSpec
from cloister_shared.vectors import Schema, vector_from_bytes, vector_to_bytes
from flwr.server.strategy.aggregate import aggregate_krum

CLIENTS, ATTACKERS, NUMBERS, TIMES = 50, 10, 1_000_000, 9
SCHEMA = Schema((("x.lora_A.weight", (8, NUMBERS // 16)), ("x.lora_B.weight", (NUMBERS // 16, 8))))
SPEC = TrainingSpec(5, 0.1, 64.0, 1.0, 1.0, 1e-3, 3e-2, 1e-5)


def _cpu(deed: Callable[[], object], times: int = TIMES) -> float:
    found = []
    for _ in range(times):
        started = time.process_time()
        deed()
        found.append(time.process_time() - started)
    return statistics.median(found)


def measure() -> dict[str, float]:
    """Medians of CPU seconds of all threads; ``extra`` in bytes."""
    rng = np.random.default_rng(0)
    update = rng.normal(0, 1e-4, NUMBERS).astype(np.float32)
    site, coordinator, key = SigningKey.generate(), SigningKey.generate(), OpeningKey.generate()
    plaintext = vector_to_bytes(update)
    header = Header(
        direction=Direction.TO_COORDINATOR,
        codec=Codec.UPDATE_F32,
        run=b"\1" * 16,
        round=1,
        attempt=1,
        client=site.verify_key.id,
        server=coordinator.verify_key.id,
        base=b"\2" * 32,
        schema=bytes.fromhex(SCHEMA.digest),
        plan=b"\3" * 32,
        parameters=NUMBERS,
        length=len(plaintext),
        time=int(time.time()),
        nonce=os.urandom(16),
    )
    frame = seal(header, plaintext, key.sealing_key, site)

    def enter() -> None:
        _, opened = open_envelope(frame, by=site.verify_key, key=key, max_bytes=1 << 24, where="bench", expect={})
        admit_update(vector_from_bytes(opened, SCHEMA, "bench"), SCHEMA, SPEC)

    rows = rng.normal(0, 1, (CLIENTS, NUMBERS)).astype(np.float32)
    robust = _cpu(lambda: combine("nnm+geometric-median", rows, ATTACKERS), 5)
    krum = _cpu(lambda: aggregate_krum([([row], 1) for row in rows], ATTACKERS, 0), 3)
    tracemalloc.start()
    combine("nnm+geometric-median", rows, ATTACKERS)
    extra = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sealing = _cpu(lambda: seal(header, plaintext, key.sealing_key, site))
    return {"sealing": sealing, "entering": _cpu(enter), "robust": robust, "krum": krum, "extra": extra}


def figures(got: dict[str, float]) -> list[tuple[str, str, str]]:
    """Lines of name, figure and target."""
    return [
        ("sealing 1M numbers, CPU", f"{1e3 * got['sealing']:.1f} ms", "< 50 ms"),
        ("opening and admitting 1M numbers, CPU", f"{1e3 * got['entering']:.1f} ms", "< 30 ms"),
        ("NNM + geometric median, 50 of 1M / flwr's Krum, CPU", f"{got['robust'] / got['krum']:.3f}", "<= 0.1"),
        ("  its CPU seconds", f"{got['robust']:.3f} s", ""),
        ("  memory beside the updates", f"{got['extra'] / 1e6:.0f} MB", "< 100 MB"),
    ]

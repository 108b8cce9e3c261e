"""The ledger's file: whatever is put back, forked, cut or edited is refused with exit code 3; a crash leaves it usable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cloister_client.budget import Ledger
from cloister_client.chain import committed
from cloister_client.counter import ORIGIN, Counter, Point, link
from cloister_client.data import open_ledger as open_sites_ledger
from cloister_client.site import Site
from cloister_client.standing import Limits
from cloister_model.text import Source
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import CloisterError, RefusedError, RollbackError, StateError
from cloister_shared.signing import SigningKey

from support import client_zygote
from support.client_ledgers import DELTA, core, open_ledger, tags
from support.client_world import make_records, make_site, make_world, write_records

CAP = 50.0
LIMITS = Limits(CAP, DELTA)
UPDATE = "ab" * 32


@dataclass
class Place:
    """A site's ledger and counter, and how they were at an earlier time.

    Attributes:
        now: Folder of the newest.
        old: A copy of it from before the last events.
    """

    now: Path
    old: Path

    @property
    def db(self) -> Path:
        """The newest ledger's file."""
        return self.now / "ledger.db"

    @property
    def counter(self) -> Path:
        """The newest counter's file."""
        return self.now / "counter" / "ledger.json"

    def events(self) -> int:
        """How many events the file holds."""
        with closing(sqlite3.connect(self.db)) as db:
            return int(db.execute("SELECT COUNT(*) FROM event").fetchone()[0])


def _work(ledger: Ledger, first: int) -> None:
    ledger.spend(ledger.reserve(core(first, steps=2), 1000).entry, UPDATE)
    ledger.lose(ledger.reserve(core(first + 1, steps=2), 1000).entry)
    ledger.void(ledger.reserve(core(first + 2, steps=2), 1000).entry, SigningKey.generate())
    ledger.reserve(core(first + 3, steps=2), 1000)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Two blocks, eight entries in every state, two of them open; the copy is four entries older."""
    now, old = tmp_path / "now", tmp_path / "old"
    now.mkdir()
    with closing(open_ledger(now, CAP)) as ledger:
        ledger.register(Source(Path("/more.jsonl"), "text", ""), tags(1, 4, 5), "later")
        _work(ledger, 1)
        shutil.copytree(now, old)  # ledger.db, its -wal and -shm: an agent that runs
        _work(ledger, 5)
    return Place(now, old)


def _put_back(place: Place) -> None:
    for part in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (place.now / part).unlink(missing_ok=True)
    for part in ("ledger.db", "ledger.db-wal"):
        if (place.old / part).exists():
            shutil.copy(place.old / part, place.now / part)


def _put_back_without_wal(place: Place) -> None:
    with closing(sqlite3.connect(place.old / "ledger.db")) as db:  # the last to close moves all of it into one file
        assert db.execute("SELECT COUNT(*) FROM event").fetchone() == (9,)
    assert not (place.old / "ledger.db-wal").exists()
    shutil.copy(place.old / "ledger.db", place.db)


def _put_back_torn(place: Place) -> None:
    _put_back(place)
    (place.now / "ledger.db-wal").unlink()


def _fork(place: Place, extra: int = 0) -> None:
    with closing(open_ledger(place.old, CAP)) as ledger:
        _work(ledger, 5)
        for number in range(extra):
            ledger.reserve(core(20 + number), 1000)
    events = place.events()
    _put_back(place) if extra else shutil.copy(place.old / "ledger.db", place.db)
    assert place.events() == events + extra


def _fork_longer(place: Place) -> None:
    _fork(place, 3)


def _delete(place: Place) -> None:
    for part in place.now.glob("ledger.db*"):
        part.unlink()


def _empty(place: Place) -> None:
    place.db.write_bytes(b"")


def _counter(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        place.counter.write_bytes(change(place.counter.read_bytes()))

    return spoil


def _no_counter(place: Place) -> None:
    place.counter.unlink()


def _counter_of_the_fork(place: Place) -> None:
    with closing(open_ledger(place.old, CAP)) as ledger:
        _work(ledger, 5)
    shutil.copy(place.old / "counter" / "ledger.json", place.counter)


ROLLBACKS: dict[str, Callable[[Place], None]] = {
    "older with its log": _put_back,
    "older without": _put_back_without_wal,
    "older less its log": _put_back_torn,
    "fork of the same length": _fork,
    "longer fork": _fork_longer,
    "deleted ledger": _delete,
    "empty ledger": _empty,
    "no counter": _no_counter,
    "empty counter": _counter(lambda data: b""),
    "half a counter": _counter(lambda data: data[: len(data) // 2]),
    "counter and more": _counter(lambda data: data + b"\n"),
    "changed counter": _counter(lambda data: data.replace(b'"seq":1', b'"seq":2').replace(b'"seq":9', b'"seq":8')),
    "junk for a counter": _counter(lambda data: b"\0" * len(data)),
    "another ledger's counter": _counter_of_the_fork,
}


@pytest.mark.parametrize("name", ROLLBACKS)
def test_what_went_back_or_forked_is_refused(place: Place, name: str) -> None:
    ROLLBACKS[name](place)
    with pytest.raises(RollbackError) as refused:
        Ledger(place.db, place.counter, LIMITS)
    assert refused.value.exit_code == 3
    assert refused.value.where
    assert "\n" not in str(refused.value)


def test_the_newest_is_not_refused_and_neither_is_an_older_counter(place: Place) -> None:
    steps = open_ledger(place.now, CAP).standing().steps
    shutil.copy(place.old / "counter" / "ledger.json", place.counter)
    ledger = open_ledger(place.now, CAP)
    assert ledger.standing().steps == steps
    point = Counter(place.counter).read()
    assert point is not None
    assert point.seq == place.events()


def test_an_older_file_under_the_newest_log_is_refused_or_is_the_newest(tmp_path: Path) -> None:
    for name in ("now", "left"):
        (tmp_path / name).mkdir()
    ledger = open_ledger(tmp_path / "now", CAP)
    _work(ledger, 1)
    with closing(sqlite3.connect(ledger.path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    older = ledger.path.read_bytes()
    _work(ledger, 5)
    with closing(sqlite3.connect(ledger.path)) as db:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    _work(ledger, 9)
    shutil.copytree(tmp_path / "now", tmp_path / "left", dirs_exist_ok=True)
    (tmp_path / "left" / "ledger.db").write_bytes(older)
    found = -1
    with contextlib.suppress(RollbackError, StateError):
        found = open_ledger(tmp_path / "left", CAP).standing().steps
    assert found in (-1, ledger.standing().steps)


def _edit(path: Path, *statements: str | Callable[[sqlite3.Connection], None]) -> None:
    """Edits with all triggers dropped, and makes them again as they were."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        assert triggers
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        before = db.total_changes
        for statement in statements:
            statement(db) if callable(statement) else db.execute(statement)
        assert db.total_changes > before, "the edit should change something"
        for _, sql in triggers:
            db.execute(sql)


def _append(record: dict[str, Any]) -> Callable[[sqlite3.Connection], None]:
    def append(db: sqlite3.Connection) -> None:
        seq, head = db.execute("SELECT seq, head FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        data = canonical(record)
        db.execute("INSERT INTO event VALUES (?, ?, ?)", (seq + 1, link(head, data), data))

    return append


def _cheaper(db: sqlite3.Connection) -> None:
    """All events after the first reservation chained anew, with fewer steps in it, and the entry to match."""
    head = bytes(32)
    for seq, data in db.execute("SELECT seq, record FROM event ORDER BY seq").fetchall():
        record = json.loads(data)
        if record.get("entry") == 1 and record["event"] == "reserve":
            record["steps"] = 1
        changed = canonical(record)
        head = link(head, changed)
        db.execute("UPDATE event SET record = ?, head = ? WHERE seq = ?", (changed, head, seq))
    db.execute("UPDATE entry SET steps = 1 WHERE id = 1")


VOID = {"event": "void", "entry": 1, "plan": "00" * 32, "left": "nothing", "at": 1.0, "signature": "00" * 64}
EDITS: dict[str, tuple[str | Callable[[sqlite3.Connection], None], ...]] = {
    "no entry": ("DELETE FROM charge", "DELETE FROM entry"),
    "one entry less": ("DELETE FROM charge WHERE entry = 8", "DELETE FROM entry WHERE id = 8"),
    "spent is void": ("UPDATE entry SET state = 'void', update_digest = NULL WHERE id = 1",),
    "spent is open": ("UPDATE entry SET state = 'reserved', update_digest = NULL, closed_at = NULL WHERE id = 1",),
    "lost is void": ("UPDATE entry SET state = 'void' WHERE state = 'lost'",),
    "fewer steps": ("UPDATE entry SET steps = 1 WHERE id = 1",),
    "more noise": ("UPDATE entry SET noise_multiplier = 900.0 WHERE id = 1",),
    "a lower rate": ("UPDATE entry SET sample_rate = 0.001 WHERE id = 1",),
    "longer ago": ("UPDATE entry SET reserved_at = reserved_at - 1e6 WHERE id = 1",),
    "closed at another time": ("UPDATE entry SET closed_at = 1 WHERE id = 1",),
    "another update": (f"UPDATE entry SET update_digest = '{'cd' * 32}' WHERE id = 1",),
    "another run": ("UPDATE entry SET run = 'cd' WHERE id = 1",),
    "another round": ("UPDATE entry SET round = 77 WHERE id = 1",),
    "another base": (f"UPDATE entry SET base = '{'cd' * 32}' WHERE id = 1",),
    "another plan": (f"UPDATE entry SET plan = '{'cd' * 32}' WHERE id = 1",),
    "another record": ("UPDATE entry SET record = x'00' WHERE id = 1",),
    "no charge": ("DELETE FROM charge",),
    "a charge to nobody's block": ("UPDATE charge SET block = 3 WHERE block = 2 AND entry = 1",),
    "a charge less": ("DELETE FROM charge WHERE block = 2 AND entry = 1",),
    "a smaller charge": ("UPDATE charge SET admitted = 0 WHERE entry = 1",),
    "a higher cap": ("UPDATE charge SET cap = 900 WHERE entry = 1",),
    "another delta": ("UPDATE charge SET delta = 0.5 WHERE entry = 1",),
    "no event": ("DELETE FROM event",),
    "the last event gone": ("DELETE FROM event WHERE seq = (SELECT MAX(seq) FROM event)",),
    "an event in the middle gone": ("DELETE FROM event WHERE seq = 4",),
    "an event's record": ("UPDATE event SET record = x'7b7d' WHERE seq = 3",),
    "an event's record as text": ("UPDATE event SET record = CAST(record AS TEXT) WHERE seq = 3",),
    "an event's head": ("UPDATE event SET head = zeroblob(32) WHERE seq = 3",),
    "all chained anew": (_cheaper,),
    "what was spent is void by a new event": (
        _append(VOID),
        "UPDATE entry SET state = 'void', update_digest = NULL, closed_at = 1.0 WHERE id = 1",
    ),
    "an event that nobody knows": (_append({"event": "lose"}),),
    "an event that is no record": (_append([1]),),  # type: ignore[arg-type]
    "a new event about no block": (_append({"event": "data", "block": 9}),),
    "a unit in a newer block": ("UPDATE unit SET block = 2 WHERE block = 1",),
    "one unit moved": ("UPDATE unit SET block = 2 WHERE tag = (SELECT MIN(tag) FROM unit WHERE block = 1)",),
    "a unit gone": ("DELETE FROM unit WHERE block = 1",),
    "a unit more": ("INSERT INTO unit VALUES (randomblob(32), 1)",),
    "a unit in no block": ("PRAGMA foreign_keys=OFF", "INSERT INTO unit VALUES (randomblob(32), 9)"),
    "a block by another name": ("UPDATE block SET name = 'other' WHERE id = 1",),
    "a block of other units": ("UPDATE block SET field = 'patient'",),
    "a block more": ("INSERT INTO block VALUES (3, 'third', '', 1.0)",),
    "the blocks and units gone": ("DELETE FROM unit", "DELETE FROM block"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_was_edited_by_hand_is_refused_though_the_triggers_were_dropped(place: Place, name: str) -> None:
    _edit(place.db, *EDITS[name])
    with pytest.raises(RollbackError) as refused:
        Ledger(place.db, place.counter, LIMITS)
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER free AFTER INSERT ON entry BEGIN DELETE FROM charge; END",
        "DROP TRIGGER entry_only_closes; CREATE TRIGGER entry_only_closes BEFORE UPDATE ON entry BEGIN SELECT 1; END",
        "DROP INDEX one_open_or_spent; CREATE INDEX one_open_or_spent ON entry (plan)",
    ],
)
def test_other_triggers_are_refused(place: Place, statement: str) -> None:
    with closing(sqlite3.connect(place.db)) as db:
        db.executescript(statement)
    with pytest.raises(RollbackError, match="tables or triggers"):
        open_ledger(place.now, CAP)


def test_triggers_that_were_dropped_come_back(place: Place) -> None:
    with closing(sqlite3.connect(place.db)) as db:
        db.executescript("DROP TRIGGER entry_stays; DROP TRIGGER charge_stays")
    open_ledger(place.now, CAP).close()
    with closing(sqlite3.connect(place.db)) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("DELETE FROM entry")


def _replaced(place: Place) -> None:
    shutil.copy(place.db, place.now / "new")
    (place.now / "new").replace(place.db)


def _backwards(place: Place) -> None:
    _edit(place.db, "DELETE FROM event WHERE seq = (SELECT MAX(seq) FROM event)")


def _backwards_with_its_counter(place: Place) -> None:
    _backwards(place)
    with closing(sqlite3.connect(place.db)) as db:
        seq, head = db.execute("SELECT seq, head FROM event ORDER BY seq DESC LIMIT 1").fetchone()
    place.counter.write_bytes(2 * Counter._slot(Point(seq, head)))


UNDER_A_RUNNING_AGENT = [_replaced, _delete, _backwards, _backwards_with_its_counter, _no_counter]


@pytest.mark.parametrize("spoil", UNDER_A_RUNNING_AGENT)
@pytest.mark.parametrize("act", ["reserve", "spend", "standings", "register"])
def test_what_is_put_back_under_a_running_agent_is_refused_before_it_is_used(
    place: Place, spoil: Callable[[Place], None], act: str
) -> None:
    ledger = open_ledger(place.now, CAP)
    acts: dict[str, Callable[[], object]] = {
        "reserve": lambda: ledger.reserve(core(50), 1000),
        "spend": lambda: ledger.spend(8, UPDATE),
        "standings": ledger.standings,
        "register": lambda: ledger.register(Source(Path("/x.jsonl"), "text", ""), tags(9)),
    }
    spoil(place)
    with pytest.raises(RollbackError):
        acts[act]()


class PowerCut(BaseException):
    """A process that ends here."""


@pytest.mark.parametrize("act", ["reserve", "spend", "lose", "register", "note"])
def test_a_crash_between_commit_and_counter_leaves_a_ledger_that_is_used_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    ledger = open_ledger(tmp_path, CAP)
    counter = Counter(tmp_path / "counter" / "ledger.json")
    entry = ledger.reserve(core(1), 1000).entry
    acts: dict[str, Callable[[], object]] = {
        "reserve": lambda: ledger.reserve(core(2), 1000),
        "spend": lambda: ledger.spend(entry, UPDATE),
        "lose": lambda: ledger.lose(entry),
        "register": lambda: ledger.register(Source(Path("/b.jsonl"), "text", ""), tags(77)),
        "note": lambda: ledger.note({}, {"loss": 1.0}),
    }
    before, steps = counter.read(), ledger.standing().steps
    with monkeypatch.context() as patched:
        patched.setattr(Counter, "advance", cut)
        with pytest.raises(PowerCut):
            acts[act]()
    assert counter.read() == before
    ledger.close()
    fresh = open_ledger(tmp_path, CAP)
    after = counter.read()
    assert before is not None
    assert after is not None
    assert after.seq == before.seq + 1
    fresh.close_open()
    assert fresh.standings()[0].steps == steps + (act == "reserve")
    fresh.reserve(core(3), 1000)


def test_a_counter_that_cannot_be_written_is_told_and_what_was_reserved_stays_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(tmp_path, CAP)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cloister_client.chain.os.pwrite", full)
        with pytest.raises(StateError, match="counter cannot be used") as told:
            ledger.reserve(core(1), 1000)
    assert "No space left" in told.value.got
    assert ledger.standing().steps == 1
    with pytest.raises(StateError, match="did not make the reservation"):
        ledger.void(1, SigningKey.generate())


def test_a_counter_without_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write"):
        Ledger(tmp_path / "fresh.db", tmp_path / "nowhere" / "ledger.json", open_ledger(tmp_path, CAP).limits)


def test_a_counter_never_goes_back_under_racing_writers(tmp_path: Path) -> None:
    points = [Point(n, hashlib.sha256(str(n).encode()).digest()) for n in range(400)]
    Counter(tmp_path / "counter").create()
    Counter(tmp_path / "counter").advance(points[1])
    seen: list[int] = []
    start = threading.Barrier(9)
    writing = threading.Event()

    def write(mine: list[Point]) -> None:
        counter = Counter(tmp_path / "counter")
        start.wait()
        for point in mine:
            counter.advance(point, sync=False)

    def read() -> None:
        start.wait()
        while not writing.is_set():
            point = Counter(tmp_path / "counter").read()
            assert point is not None
            assert point == points[point.seq]
            seen.append(point.seq)

    writers = [threading.Thread(target=write, args=(points[n + 2 :: 8],)) for n in range(7)]
    writers.append(threading.Thread(target=write, args=(points[:1:-1],)))
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    writing.set()
    reader.join()
    assert seen == sorted(seen)
    assert seen
    assert Counter(tmp_path / "counter").read() == points[-1]


def test_a_counter_of_the_same_number_and_another_head_is_refused(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "counter")
    counter.create()
    counter.advance(Point(3, bytes(32)))
    with pytest.raises(RollbackError):
        counter.advance(Point(3, b"\1" * 32))
    counter.advance(ORIGIN)
    assert counter.read() == Point(3, bytes(32))


@pytest.mark.parametrize("slot", [0, 1])
def test_a_counter_survives_a_write_that_broke_off(tmp_path: Path, slot: int) -> None:
    counter = Counter(tmp_path / "counter")
    counter.create()
    for number in range(1, 6):
        counter.advance(Point(number, bytes(32)))
    data = bytearray(counter.path.read_bytes())
    data[slot * Counter.SLOT + 30 : slot * Counter.SLOT + 40] = bytes(10)
    counter.path.write_bytes(bytes(data))
    point = counter.read()
    assert point is not None
    assert point.seq in (4, 5)
    counter.advance(Point(6, bytes(32)))
    assert counter.read() == Point(6, bytes(32))


def test_nothing_is_left_beside_the_ledger_and_all_is_the_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ledger = open_ledger(tmp_path, CAP)
        _work(ledger, 1)
        parts = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert {p.name for p in parts} == {"ledger.db", "ledger.db-wal", "ledger.db-shm", "ledger.json"}
        assert {p.stat().st_mode & 0o777 for p in parts} == {0o600}
    finally:
        os.umask(old)
    ledger.close()
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"ledger.db", "ledger.json"}


def test_a_forked_child_cannot_use_its_parents_ledger(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from cloister_shared.errors import StateError\n"
        "from support.client_ledgers import core, open_ledger\n"
        "ledger = open_ledger(Path(sys.argv[1]), 50.0)\n"
        "entry = ledger.reserve(core(1), 1000).entry\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        ledger.spend(entry, 'ab' * 32)\n"
        "    except StateError as error:\n"
        "        print(error.what, flush=True)\n"
        "    sys.exit()\n"
        "os.wait()\n"
        "ledger.spend(entry, 'cd' * 32)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a ledger does not outlive a fork\n", "")
    assert open_ledger(tmp_path, CAP).spent_on(core(1).digest) == "cd" * 32


def test_a_reader_does_not_wait_for_a_reservation_that_takes_long(tmp_path: Path) -> None:
    """An accountant may take a minute inside the reservation's transaction; the owner still sees where it stands."""
    ledger, other = open_ledger(tmp_path, CAP), open_ledger(tmp_path, CAP)
    with ledger._chain.transaction():
        assert other.standing().steps == 0
        third = Ledger(ledger.path, tmp_path / "counter" / "ledger.json", ledger.limits)
        assert third.sources()


def _restore(site: Site, old: Path) -> None:
    for part in ("ledger.db", "ledger.db-wal"):
        (site.agent_home / part).unlink(missing_ok=True)
    shutil.copy(old, site.agent_home / "ledger.db")


def test_the_agent_ends_with_three_and_one_line_where_its_ledger_is_not_the_newest(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_RUNTIME", str(tmp_path))
    world, told = make_world(tiny_bert), {}
    homes = []
    for name in ("restored", "no counter", "edited"):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        site = make_site(world, folder / "site", write_records(folder / "data.jsonl", make_records(12)))
        shutil.copy(site.agent_home / "ledger.db", folder / "old.db")
        with closing(open_sites_ledger(site)) as ledger:
            ledger.spend(ledger.reserve(core(1), 1000).entry, UPDATE)
        if name == "restored":
            _restore(site, folder / "old.db")
            told[site.home] = "the ledger went back in time"
        elif name == "no counter":
            site.counter.unlink()
            told[site.home] = "the ledger's counter is missing"
        else:
            _edit(site.agent_home / "ledger.db", "UPDATE entry SET noise_multiplier = 900.0")
            told[site.home] = "the ledger was changed by hand"
        homes.append(site.home)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, client_zygote.__file__, *map(str, homes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for home in homes:
        lines = (home / "err").read_text().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert told[home] in lines[0]
        assert (home / "code").read_text() == "3"


def test_what_the_events_say_is_enough_to_tell_every_row(place: Place) -> None:
    """An entry's plan is the digest of its record, and its block's tags hash to what registering told."""
    with closing(sqlite3.connect(place.db)) as db:
        for plan, record in db.execute("SELECT plan, record FROM entry"):
            assert digest(record) == plan
        data = json.loads(db.execute("SELECT record FROM event WHERE seq = 1").fetchone()[0])
        salt, facts = db.execute("SELECT salt, record FROM fact WHERE seq = 1").fetchone()
    # What says something of the text is beside the event, which has a salted hash of it.
    assert json.loads(facts)["tags"] == digest(b"".join(tags(1, 2, 3)))
    assert data["facts"] == committed(salt, facts)
    assert set(data) == {"event", "block", "at", "facts"}


def test_racers_that_open_a_fresh_ledger_at_once_find_it_whole(tmp_path: Path) -> None:
    start, failed = threading.Barrier(6), []

    def race(number: int) -> None:
        start.wait()
        try:
            with closing(open_ledger(tmp_path, CAP)) as ledger:
                ledger.reserve(core(1, run=f"{number:02x}"), 1000)
        except (CloisterError, RefusedError) as error:
            failed.append(error)

    (tmp_path / "counter").mkdir()
    threads = [threading.Thread(target=race, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert open_ledger(tmp_path, CAP).standing().steps == 6

"""Versions of the registry's tables: whole or not at all, by command alone, once where two are started, rows and log as they were."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from cloister_server import database as databases
from cloister_server import rules
from cloister_server.database import VERSION, Database, checked_url
from cloister_server.fsck import check
from cloister_server.storage import read_storage, write_storage
from cloister_server.store import Store
from cloister_server.upkeep import migrate
from cloister_shared import console
from cloister_shared.errors import InputError, StateError
from cloister_shared.signing import SigningKey
from sqlalchemy import create_engine, inspect
from sqlmodel import SQLModel

VECTOR = Path(__file__).parents[1] / "vectors" / "registry-0001.sql"
MIGRATIONS = Path(databases.__file__).parent / "migrations"
RUN = "ab" * 16


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A coordinator's folder whose registry is in one of the two databases, with nothing in it."""
    folder = tmp_path / "coordinator"
    folder.mkdir()
    SigningKey.generate().save(folder / "sign.key")
    if request.param == "postgresql":
        write_storage(folder, request.getfixturevalue("postgres").database(), "")
    return folder


def sql(home: Path, *statements: str) -> list[Any]:
    """Runs SQL behind the registry's back; the last one's rows."""
    engine = create_engine(read_storage(home).database)
    try:
        with engine.begin() as connection:
            for statement in statements:
                done = connection.exec_driver_sql(statement)
            return [tuple(row) for row in done] if done.returns_rows else []
    finally:
        engine.dispose()


def older(home: Path, *, stamped: bool = True) -> None:
    """Makes a registry of version 0001 with an open round in it."""
    engine = create_engine(read_storage(home).database)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        command.upgrade(config, "0001")
    engine.dispose()
    texts = ", ".join(["''"] * 6)
    sql(
        home,
        "INSERT INTO run (id, federation, created, rounds, base, task, rule, tensors, config, code)"
        f" VALUES ('{RUN}', 'fed', 1.0, 3, {texts})",
        "INSERT INTO round (run, number, state, attempt, adapter, opened, seconds, judging_seconds, sent_bytes, received_bytes)"
        f" VALUES ('{RUN}', 0, 'committed', 1, '{'11' * 32}', 1, 0, 0, 0, 0), ('{RUN}', 1, 'open', 1, NULL, 1, 0, 0, 0, 0)",
        *([] if stamped else ["DROP TABLE alembic_version"]),
    )


def shape(home: Path) -> dict[str, list[str]]:
    """Every table's columns."""
    engine = create_engine(read_storage(home).database)
    try:
        look = inspect(engine)
        return {t: sorted(c["name"] for c in look.get_columns(t)) for t in sorted(look.get_table_names())}
    finally:
        engine.dispose()


def test_the_newest_version_is_the_one_that_the_code_asks_for() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [VERSION]


def test_what_versions_make_is_what_the_tables_say(home: Path) -> None:
    Store(home).close()
    engine = create_engine(read_storage(home).database)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
    engine.dispose()


@pytest.mark.parametrize("stamped", [True, False])
def test_an_older_registry_opens_after_the_command_alone(
    home: Path, stamped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older(home, stamped=stamped)
    before = shape(home)
    with pytest.raises(StateError, match="older version") as caught:
        Store(home)
    assert caught.value.mend == "cloister registry migrate"
    assert shape(home) == before
    monkeypatch.setattr(console.OUTPUT, "home", home.parent)
    monkeypatch.setattr(console.OUTPUT, "json", True)
    migrate(json=True)
    assert json.loads(capsys.readouterr().out) == {"before": "0001", "after": VERSION, "laid": []}
    store = Store(home)
    assert [(r.number, r.state, r.fence) for r in store.rounds(RUN)] == [(0, "committed", 0), (1, "planned", 0)]
    assert set(store.named_blobs()) == {"11" * 32}
    assert store.database.rules() == rules.expected(store.database.dialect)
    store.close()
    migrate(json=True)
    assert json.loads(capsys.readouterr().out) == {"before": VERSION, "after": VERSION, "laid": []}


def test_rules_that_are_gone_stop_a_coordinator_and_are_laid_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(home).close()
    gone = ["kept_fence_delete", "kept_round_update"]
    on = {"kept_fence_delete": "fence", "kept_round_update": "round"}
    postgres = read_storage(home).database.drivername != "sqlite"
    sql(home, *(f"DROP TRIGGER {name}" + (f" ON {on[name]}" if postgres else "") for name in gone))
    store = Store(home)
    with pytest.raises(StateError, match="does not refuse") as caught:
        store.take_fence()
    assert all(name in caught.value.got for name in gone)
    store.close()
    monkeypatch.setattr(console.OUTPUT, "home", home.parent)
    monkeypatch.setattr(console.OUTPUT, "json", True)
    migrate(json=True)
    assert json.loads(capsys.readouterr().out)["laid"] == gone
    store = Store(home)
    assert store.take_fence() == 1
    store.close()


@pytest.mark.parametrize(
    "instead",
    [
        "BEFORE UPDATE ON round FOR EACH ROW WHEN (false)", "BEFORE UPDATE OF run ON round FOR EACH ROW",
        "BEFORE DELETE ON round FOR EACH ROW", "BEFORE UPDATE ON round FOR EACH STATEMENT", "AFTER UPDATE ON round FOR EACH ROW", "",
    ],
)  # fmt: skip
def test_a_rule_of_the_same_name_that_refuses_less_is_seen(tmp_path: Path, postgres: Any, instead: str) -> None:
    """PostgreSQL keeps a trigger's deed, condition and columns apart from the body of its function."""
    home = tmp_path / "coordinator"
    home.mkdir()
    SigningKey.generate().save(home / "sign.key")
    write_storage(home, postgres.database(), "")
    Store(home).close()
    name = "kept_round_update"
    anew = f"CREATE TRIGGER {name} {instead} EXECUTE FUNCTION {name}()"
    if instead:
        sql(home, f"DROP TRIGGER {name} ON round", anew)
    else:
        sql(home, f"ALTER FUNCTION {name}() SET search_path = elsewhere")
    store = Store(home)
    assert rules.missing(store.database.rules()) == [name]
    with pytest.raises(StateError, match="does not refuse"):
        store.take_fence()
    store.close()


@pytest.mark.parametrize("rows", [[], ["0001", "0002"], [""], ["head"]])
def test_a_version_that_is_none_is_not_migrated(home: Path, rows: list[str]) -> None:
    older(home)
    sql(home, "DELETE FROM alembic_version")
    if len(rows) > 1:
        sql(
            home,
            "ALTER TABLE alembic_version RENAME TO other",
            "CREATE TABLE alembic_version (version_num VARCHAR(32))",
        )
    for row in rows:
        sql(home, f"INSERT INTO alembic_version (version_num) VALUES ('{row}')")
    with pytest.raises(StateError):
        Store(home)
    database = Database(read_storage(home).database, lambda: "", migrating=True)
    with pytest.raises(StateError, match="cannot be migrated"):
        database.migrate()
    database.close()


def test_an_adapter_that_is_a_groups_mean_too_is_one_blob(home: Path) -> None:
    older(home)
    columns = 'run, number, "group", clients, mean'
    sql(home, f"INSERT INTO opening ({columns}) VALUES ('{RUN}', 1, 'g', '[]', '{'11' * 32}')")
    database = Database(read_storage(home).database, lambda: "", migrating=True)
    database.migrate()
    database.close()
    assert [tuple(row)[1] for row in sql(home, "SELECT digest, kind FROM blob")] == ["adapter"]


def test_a_registry_that_was_in_use_migrates_with_all_that_it_had(tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    home.mkdir()
    text = VECTOR.read_text()
    (home / "sign.key").write_bytes(bytes.fromhex(text.splitlines()[1].rsplit(" ", 1)[1]))
    (home / "sign.key").chmod(0o600)
    with sqlite3.connect(home / "registry.db") as db:
        db.executescript(text)
        was = {t: db.execute(f"SELECT * FROM {t}").fetchall() for t in ("log_leaf", "round_client", "witnessed")}
    database = Database(read_storage(home).database, lambda: "", migrating=True)
    assert database.migrate().before == "0001"
    database.close()
    with sqlite3.connect(home / "registry.db") as db:
        assert {t: db.execute(f"SELECT * FROM {t}").fetchall() for t in was} == was
    store = Store(home)
    run = store.find_run(None)
    assert [(r.number, r.state) for r in store.rounds(run.id)] == [
        (0, "committed"), (1, "committed"), (2, "committed"), (3, "aborted"),
    ]  # fmt: skip
    # Its blobs are elsewhere; nothing else is wrong: every leaf verifies, every alias is where its last move put it.
    assert {one.what for one in check(store)} == {"blob is missing"}
    at = store.checkpoint()
    store.log("incident", {"what": "after"})
    assert store.tree().consistency(at.size, at.size + 1)
    store.close()


@pytest.mark.parametrize("found", ["9999", "else"])
def test_what_this_version_does_not_know_is_left_alone(home: Path, found: str) -> None:
    Store(home).close()
    sql(home, f"UPDATE alembic_version SET version_num = '{found}'")
    before = shape(home)
    with pytest.raises(StateError, match="newer version" if found == "9999" else "older version"):
        Store(home)
    database = Database(read_storage(home).database, lambda: "", migrating=True)
    with pytest.raises(StateError, match="cannot be migrated"):
        database.migrate()
    database.close()
    assert shape(home) == before


def test_tables_that_are_not_a_registrys_are_left_alone(home: Path) -> None:
    sql(home, "CREATE TABLE somebody (id INTEGER PRIMARY KEY)")
    with pytest.raises(StateError, match="older version"):
        Store(home)
    assert list(shape(home)) == ["somebody"]


KILLED = """
import os, sys
from pathlib import Path
from sqlalchemy import event
from cloister_server.database import Database
from cloister_server.storage import read_storage
database, left = Database(read_storage(Path(sys.argv[1])).database, str, migrating=True), int(sys.argv[2])
@event.listens_for(database._reading, "before_cursor_execute")
def count(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
database.migrate()
print(left)
"""


def test_a_migration_that_is_killed_anywhere_has_changed_nothing(home: Path) -> None:
    older(home)
    before = shape(home)
    for point in (1, 5, 9, 13, 17, 25, 60):
        done = subprocess.run([sys.executable, "-c", KILLED, str(home), str(point)], capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        assert shape(home) == before
        assert sql(home, "SELECT version_num FROM alembic_version") == [("0001",)]
    done = subprocess.run([sys.executable, "-c", KILLED, str(home), "-1"], capture_output=True, text=True)
    assert (done.returncode, int(done.stdout) < -60) == (0, True), done.stderr
    store = Store(home)
    assert store.database.rules() == rules.expected(store.database.dialect)
    store.close()


STARTED = """
import sys
from pathlib import Path
from cloister_server.database import Database
from cloister_server.storage import read_storage
database = Database(read_storage(Path(sys.argv[1])).database, str, migrating=True)
print("ready", flush=True)
sys.stdin.readline()
print(database.migrate().before)
"""


def test_of_many_started_at_once_one_migrates(home: Path) -> None:
    older(home)
    run = [sys.executable, "-c", STARTED, str(home)]
    children = [subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    outs = []
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        outs.append(child.communicate(timeout=60)[0].strip())
        assert child.returncode == 0
    assert sorted(outs) == ["0001", VERSION, VERSION, VERSION]


def test_an_empty_database_is_made_once_by_many(home: Path) -> None:
    code = "import sys; from pathlib import Path; from cloister_server.store import Store; Store(Path(sys.argv[1]))"
    children = [subprocess.Popen([sys.executable, "-c", code, str(home)]) for _ in range(4)]
    assert [child.wait(timeout=60) for child in children] == [0] * 4
    assert sql(home, "SELECT version_num FROM alembic_version") == [(VERSION,)]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@db.example.org/registry",
        "postgresql://me@db.example.org/registry?password=secret",
        "postgresql://me@db.example.org/registry?sslpassword=secret",
        "postgresql://me@db.example.org/registry?conninfo=password%3Dsecret",
        "postgresql://me@db.example.org/registry?sslmode=prefer",
        "postgresql://me@db.example.org/registry?host=localhost",
        "postgresql://me@/registry?host=/tmp,db.example.org",
        "postgresql://me@localhost/registry?hostaddr=10.0.0.1",
        "postgresql://me@/registry?service=remote",
        "postgresql://me@/registry",
        "postgresql://me@localhost:x/registry",
        "mysql://me@localhost/registry",
        "nonsense",
    ],
)
def test_passwords_and_plain_transport_are_no_url_for_a_registry(url: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_url(url, "test")
    assert "secret" not in str(caught.value)


def test_whatever_leaves_the_machine_is_encrypted_and_its_server_known() -> None:
    assert dict(checked_url("postgresql://me@db.example.org/r", "test").query) == {
        "sslmode": "verify-full", "sslrootcert": "system",
    }  # fmt: skip
    for local in ("postgresql://me@localhost/r", "postgresql://me@/r?host=/run/postgresql"):
        assert "sslmode" not in checked_url(local, "test").query

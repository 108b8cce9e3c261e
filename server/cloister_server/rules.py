"""What the registry's database itself refuses, whoever asks: triggers, one a rule, on SQLite and PostgreSQL alike.

A committed round and all that belongs to it, a charge, a move of an alias and a leaf never change, go or come twice; a round moves
between its states as ``tables.MOVES`` says. An owner of the database can take triggers away: ``registry fsck`` sees that, and the log
sees what was done meanwhile. On SQLite, REPLACE deletes without a DELETE trigger: hence the rules for INSERT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection
from sqlmodel import SQLModel

from cloister_server.tables import COMMITTED, MOVES, PLANNED


@dataclass(frozen=True)
class Rule:
    """One thing that is refused.

    Attributes:
        table: Of which table.
        deed: INSERT, UPDATE or DELETE.
        when: SQL over OLD and NEW.
        words: What is said.
        name: Tells two rules of one table and deed apart.
    """

    table: str
    deed: str
    when: str
    words: str
    name: str = ""

    @property
    def trigger(self) -> str:
        """The trigger's name."""
        return "_".join(filter(None, ("kept", self.table, self.deed.lower(), self.name)))

    def sqlite(self) -> Iterator[str]:
        """Statements that make it on SQLite."""
        when = self.when
        if self.deed == "INSERT":
            # A row that comes under another's rowid would take its place by REPLACE.
            when = f'({when}) OR EXISTS (SELECT 1 FROM "{self.table}" WHERE rowid = NEW.rowid)'
        if self.name == "key":
            when = f"{when} OR OLD.rowid <> NEW.rowid"
        yield (
            f'CREATE TRIGGER {self.trigger} BEFORE {self.deed} ON "{self.table}" WHEN {when}'
            f" BEGIN SELECT RAISE(ABORT, '{self.words}'); END"
        )

    @property
    def body(self) -> str:
        """The function's body on PostgreSQL."""
        row = "OLD" if self.deed == "DELETE" else "NEW"
        refusal = f"RAISE EXCEPTION '{self.words}' USING ERRCODE = 'integrity_constraint_violation'"
        return f"BEGIN IF {self.when} THEN {refusal}; END IF; RETURN {row}; END"

    def postgresql(self) -> Iterator[str]:
        """Statements that make it on PostgreSQL."""
        yield f"CREATE FUNCTION {self.trigger}() RETURNS trigger LANGUAGE plpgsql AS $rule${self.body}$rule$"
        yield (
            f'CREATE TRIGGER {self.trigger} BEFORE {self.deed} ON "{self.table}"'
            f" FOR EACH ROW EXECUTE FUNCTION {self.trigger}()"
        )


_STAYS = "what is committed stays: a committed round never changes"
# Rows that are written once and never change, and in which words that is refused.
_FINAL = {
    "noised_sum": "what was charged stays",
    "log_leaf": "the log is only added to",
    **{name: f"a row of {name} stays as it is" for name in ("alias_event", "draw", "model", "signature", "tombstone")},
}
# Rows that change, but for their keys; whether another may come under the same key.
_LIVING = {
    **dict.fromkeys(("run", "opening", "fence", "hold", "alias"), False),
    **dict.fromkeys(("round", "round_client", "metric", "evidence", "judgement", "summed", "privacy"), True),
}
OF_ROUNDS = ("round_client", "metric", "evidence", "judgement", "summed", "privacy")
_KEPT = {
    "run": "a run stays",
    "alias": "an alias stays",
    "fence": "a fence stays",
    "hold": "a hold is released, not deleted",
    "opening": "for whom a group opened stays",
}
_FIXED = ("federation", "created", "rounds", "base", "task", "rule", "tensors", "config", "code", "tokenizer")


def _keys(table: str) -> list[str]:
    return [column.name for column in SQLModel.metadata.tables[table].primary_key]


def _there(table: str) -> str:
    """That a row with the new one's key is there."""
    same = " AND ".join(f'"{key}" = NEW."{key}"' for key in _keys(table))
    return f'EXISTS (SELECT 1 FROM "{table}" WHERE {same})'


def rules() -> Iterator[Rule]:
    """Every rule of this version."""
    same = "SELECT 1 FROM round WHERE run = NEW.run AND number = NEW.number"
    yield Rule("round", "INSERT", f"EXISTS ({same} AND state = '{COMMITTED}')", f"UNIQUE: {_STAYS}")
    first = f"NEW.state = '{PLANNED}' OR (NEW.number = 0 AND NEW.state = '{COMMITTED}')"
    yield Rule("round", "INSERT", f"NOT ({first})", "a round begins as planned", "state")
    for deed in ("UPDATE", "DELETE"):
        yield Rule("round", deed, f"OLD.state = '{COMMITTED}'", _STAYS)
    moves = " OR ".join(f"(OLD.state = '{a}' AND NEW.state = '{b}')" for a, b in MOVES)
    yield Rule(
        "round",
        "UPDATE",
        f"OLD.state <> '{COMMITTED}' AND OLD.state <> NEW.state AND NOT ({moves})",
        "a round does not move so",
        "state",
    )
    for table, again in _LIVING.items():
        # REPLACE would take the place of the row that has the key already.
        other = " OR ".join(f'OLD."{key}" <> NEW."{key}"' for key in _keys(table))
        yield Rule(table, "UPDATE", other, f"UNIQUE: a row of {table} keeps its key: {_STAYS}", "key")
        if not again:
            yield Rule(table, "INSERT", _there(table), f"UNIQUE: a row of {table} is there already")
    yield Rule("round", "UPDATE", "NEW.attempt < OLD.attempt", "attempts only rise", "attempt")
    for table in OF_ROUNDS:
        yield Rule(table, "DELETE", "1 = 1", f"what was asked and what it cost stays: {_STAYS}")
        for deed, row in (("UPDATE", "OLD"), ("INSERT", "NEW")):
            of = f"run = {row}.run AND number = {row}.number AND state = '{COMMITTED}'"
            yield Rule(table, deed, f"EXISTS (SELECT 1 FROM round WHERE {of})", _STAYS)
    for table, words in _FINAL.items():
        yield Rule(table, "INSERT", _there(table), f"UNIQUE: {words}")
        for deed in ("UPDATE", "DELETE"):
            yield Rule(table, deed, "1 = 1", words)
    for table, words in _KEPT.items():
        yield Rule(table, "DELETE", "1 = 1", words)
    changed = " OR ".join(f"OLD.{column} <> NEW.{column}" for column in _FIXED)
    yield Rule("run", "UPDATE", changed, "what a run began with stays")
    yield Rule("alias", "UPDATE", "NEW.version <> OLD.version + 1", "an alias moves on")
    yield Rule("fence", "UPDATE", "NEW.number <= OLD.number", "a fence only rises")
    held = "OLD.released IS NOT NULL OR NEW.released IS NULL OR " + " OR ".join(
        f"OLD.{column} <> NEW.{column}" for column in ("run", "number", "adapter", "why", "at", "leaf")
    )
    yield Rule("hold", "UPDATE", held, "a hold is released once, and stays otherwise")
    asked = "OLD.mean <> '' OR OLD.clients <> NEW.clients"
    yield Rule("opening", "UPDATE", asked, "for whom a group opened stays")


_EMPTIED = "kept_truncate"


def _protected() -> list[str]:
    return sorted({rule.table for rule in rules()})


def missing(found: set[str]) -> list[str]:
    """Names of the rules that are not among those that a database has, as ``found`` gives them."""
    have = {rule.trigger for rule in rules() if found & {*rule.sqlite(), _told(rule)}}
    return sorted({rule.trigger for rule in rules()} - have)


# PostgreSQL's pg_trigger.tgtype: for each row, before, and the deed.
_ROW, _BEFORE, _DEEDS = 1, 2, {"INSERT": 4, "DELETE": 8, "UPDATE": 16, "TRUNCATE": 32}


def _told(rule: Rule) -> str:
    return f"{rule.table} {rule.trigger} O {_ROW + _BEFORE + _DEEDS[rule.deed]} always {rule.body}"


def expected(dialect: str) -> set[str]:
    """The rules as ``found`` gives them from a database where none is missing."""
    if dialect == "sqlite":
        return {statement for rule in rules() for statement in rule.sqlite()}
    return {_told(rule) for rule in rules()} | {
        f"{table} {_EMPTIED}_{table} O {_BEFORE + _DEEDS['TRUNCATE']} always {_TRUNCATE}" for table in _protected()
    }


_TRUNCATE = "BEGIN RAISE EXCEPTION 'the registry is not emptied' USING ERRCODE = 'integrity_constraint_violation'; END"


def found(connection: Connection) -> set[str]:
    """The rules that a database has, as it holds them."""
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE type = 'trigger'")
        return {str(row[0]) for row in rows}
    rows = connection.exec_driver_sql(
        "SELECT c.relname, t.tgname, t.tgenabled, t.tgtype, t.tgqual IS NULL AND t.tgattr::text = '' AND p.proconfig IS NULL,"
        " p.prosrc FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid"
        " JOIN pg_proc p ON p.oid = t.tgfoid WHERE NOT t.tgisinternal AND c.relnamespace = current_schema()::regnamespace"
    )
    # Its deed and time, whether it has conditions or columns of its own, and settings under which its body would read other tables.
    return {
        f"{table} {name} {on.decode() if isinstance(on, bytes) else on} {kind} {'always' if bare else 'sometimes'} {body}"
        for table, name, on, kind, bare, body in rows
    }


def lift(connection: Connection) -> None:
    """Takes every rule away, in the transaction of a migration."""
    if connection.dialect.name == "sqlite":
        for (name,) in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").all():
            connection.exec_driver_sql(f'DROP TRIGGER "{name}"')
        return
    names = connection.exec_driver_sql(
        "SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace AND proname LIKE 'kept%%'"
    ).all()
    for (name,) in names:
        connection.exec_driver_sql(f'DROP FUNCTION "{name}" CASCADE')


def lay(connection: Connection) -> None:
    """Makes every rule, in the transaction of a migration."""
    sqlite = connection.dialect.name == "sqlite"
    for rule in rules():
        for statement in rule.sqlite() if sqlite else rule.postgresql():
            connection.exec_driver_sql(statement)
    for table in () if sqlite else _protected():
        name = f"{_EMPTIED}_{table}"
        connection.exec_driver_sql(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $rule${_TRUNCATE}$rule$"
        )
        connection.exec_driver_sql(
            f'CREATE TRIGGER {name} BEFORE TRUNCATE ON "{table}" FOR EACH STATEMENT EXECUTE FUNCTION {name}()'
        )

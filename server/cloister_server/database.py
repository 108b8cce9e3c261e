"""The registry's database: SQLite in the coordinator's folder, or PostgreSQL by URL; transactions, and the version of its tables.

Whoever writes takes the registry's lock before anything else (BEGIN IMMEDIATE; an advisory lock), so that what it reads
stays so until it commits: leaves get their places and budgets are priced there. Readers take none and see what was committed.

A database with nothing in it is made, where no blobs say that there was a registry: a new one would sign a fork of the log that was lost,
and gc take whatever it does not name. One of an older version is changed by ``cloister registry migrate`` alone, in one transaction
under the same lock: of two started at once one migrates and the other finds it done, and one that is killed has changed nothing.
Passwords have no place in a URL: libpq reads them from PGPASSWORD or ~/.pgpass.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_shared.errors import InputError, StateError
from sqlalchemy import Connection, Engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, IntegrityError, SQLAlchemyError
from sqlmodel import Session, create_engine

from cloister_server import rules

VERSION = "0002"
SECONDS = 30
_LOCK = 0x636C6F6973746572  # "cloister"
_NO_LOCK = "55P03"  # PostgreSQL's lock_not_available
_KEYS = {"host", "port", "sslmode", "sslrootcert", "application_name"}
_ENCRYPTED = ("verify-full", "verify-ca")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def sqlite_url(home: Path) -> str:
    """URL of the database in a coordinator's folder."""
    return f"sqlite:///{home / 'registry.db'}"


def checked_url(text: str, where: str) -> URL:
    """Reads the URL of a database.

    Args:
        text: ``sqlite:///PATH`` or ``postgresql://USER@HOST/NAME``.
        where: For errors.

    Raises:
        InputError: Another kind of database, a password in it, or a connection that others could read.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError("not the URL of a database", where=where, expected="postgresql://USER@HOST/NAME") from error
    if url.drivername == "sqlite":
        return url
    if url.drivername != "postgresql":
        raise InputError("not a database for a registry", where=where, expected="postgresql", got=url.drivername)
    if url.password is not None or "password" in url.query:
        raise InputError(
            "a password is in the URL, where others read it", where=where, mend="put it into ~/.pgpass, or PGPASSWORD"
        )
    odd = sorted(set(url.query) - _KEYS)
    values = [url.host or "", *(v for v in url.query.values() if isinstance(v, str))]
    if (
        odd
        or len(values) <= len(url.query)
        or any("," in value for value in values)
        or ("host" in url.query and url.host)
    ):
        raise InputError(
            "not the URL of one database", where=where, expected=f"one host, and of options {', '.join(sorted(_KEYS))}",
            got=", ".join(odd) or "several hosts",
        )  # fmt: skip
    host, mode = str(url.query.get("host", url.host or "")), url.query.get("sslmode")
    if not host:
        raise InputError("a database without a host", where=where, expected="a host, or ?host=/FOLDER/OF/SOCKET")
    local = host.startswith("/") or host in _LOOPBACK
    if not local and mode is None:
        url = url.update_query_dict({"sslmode": "verify-full", "sslrootcert": url.query.get("sslrootcert", "system")})
    elif not local and mode not in _ENCRYPTED:
        raise InputError(
            "others could read this connection", where=where, expected=f"sslmode={_ENCRYPTED[0]}", got=str(mode)
        )
    return url.set(drivername="postgresql+psycopg")


@dataclass(frozen=True)
class Migrated:
    """What a migration did.

    Attributes:
        before: The version that was found; empty where there was nothing.
        after: The version that is there now.
        laid: Names of rules that were missing or changed, of a registry that was of this version already.
    """

    before: str
    after: str
    laid: tuple[str, ...] = ()


class Database:
    """The registry's database, opened.

    Args:
        url: From ``checked_url``.
        held: What lies in the registry's place for blobs, in words; empty where nothing does.
        migrating: Whether an older version is let in, for ``migrate``.

    Raises:
        StateError: It cannot be opened, it is of another version, or it is empty and the place for blobs is not.
    """

    def __init__(self, url: URL, held: Callable[[], str], *, migrating: bool = False) -> None:
        self._held = held
        self.sqlite = url.drivername == "sqlite"
        self.where = str(url.database) if self.sqlite else url.render_as_string()
        if self.sqlite:
            with self._as_state_error():
                os.close(os.open(self.where, os.O_CREAT | os.O_RDWR, 0o600))
                os.chmod(self.where, 0o600)
        self._reading = _engine(url)
        self._writing = self._reading.execution_options(registry_lock=True)
        with self._as_state_error(), self._reading.connect() as connection:
            found = _version(connection)
        if not found and not migrating:
            try:
                found = self.migrate().after
            except StateError:
                self.close()
                raise
        if found != VERSION and not migrating:
            self.close()
            newer = found.isdigit() and found > VERSION
            raise StateError(
                "the registry is of a newer version" if newer else "the registry is of an older version",
                where=self.where,
                expected=VERSION,
                got=found,
                mend="install the version that it was last used with" if newer else "cloister registry migrate",
            )

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that holds the registry's lock; committed at the end, or nothing of it.

        Raises:
            StateError: The database refuses or fails.
        """
        with self._as_state_error(), Session(self._writing, expire_on_commit=False) as session:
            # Else the lock would be taken with the first statement, and what was looked at before it could have changed since.
            session.connection()
            yield session
            session.commit()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads.

        Raises:
            StateError: The database fails.
        """
        with self._as_state_error(), Session(self._reading, expire_on_commit=False) as session:
            yield session

    def rules(self) -> set[str]:
        """What the database refuses by itself, as it holds it; ``rules.expected`` has what it should."""
        with self.reading() as session:
            return rules.found(session.connection())

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return "sqlite" if self.sqlite else "postgresql"

    def version(self) -> str:
        """The version of its tables; empty where there are none."""
        with self.reading() as session:
            return _version(session.connection())

    def migrate(self) -> Migrated:
        """Brings the tables to this version, in one transaction under the registry's lock.

        Raises:
            StateError: The database is older than migrations are, or newer than this version, or fails; or it was emptied.
        """
        from alembic import command
        from alembic.config import Config

        with self._as_state_error(), self._writing.connect() as connection, connection.begin():
            before = _version(connection)
            # Under the lock: whoever made the tables may have put a blob since.
            if not before and (held := self._held()):
                raise StateError(
                    "the registry's database is empty, and its place for blobs is not",
                    where=self.where,
                    expected="the registry that those blobs are of",
                    got=held,
                    mend="restore the database from a copy; a new registry takes a place of its own, or what lies there moved away",
                )
            if before == VERSION:
                laid = tuple(rules.missing(rules.found(connection)))
                rules.lift(connection)
                rules.lay(connection)
                return Migrated(before, before, laid)
            if before and (not before.isdigit() or before > VERSION):
                raise StateError(
                    "the registry cannot be migrated",
                    where=self.where,
                    expected=f"a version up to {VERSION}",
                    got=before,
                    mend="install the version that it was last used with",
                )
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            rules.lift(connection)
            if before and not inspect(connection).has_table("alembic_version"):
                command.stamp(config, before)
            command.upgrade(config, VERSION)
            rules.lay(connection)
        return Migrated(before, VERSION)

    def close(self) -> None:
        """Closes every connection."""
        self._reading.dispose()

    @contextmanager
    def _as_state_error(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError) as error:
            raise StateError("the registry refused", where=self.where, got=str(error.orig).splitlines()[0]) from error
        except SQLAlchemyError as error:
            if _is_busy(error):
                raise StateError(
                    "another command is writing here",
                    where=self.where,
                    expected=f"the lock within {SECONDS} s",
                    mend="try again",
                ) from error
            raise StateError(
                "the registry's database fails",
                where=self.where,
                got=str(error).splitlines()[0][:300],
                mend="free space, or restore it from a copy"
                if self.sqlite
                else "does PostgreSQL run there, and may this user and host in?",
            ) from error
        except OverflowError as error:
            raise StateError("the registry refused", where=self.where, got=str(error)) from error
        except OSError as error:
            raise StateError("the registry cannot be opened", where=self.where, got=str(error)) from error


def _is_busy(error: SQLAlchemyError) -> bool:
    """Whether a lock could not be had in time."""
    told = getattr(error, "orig", None)
    return getattr(told, "sqlite_errorname", "") == "SQLITE_BUSY" or getattr(told, "sqlstate", "") == _NO_LOCK


def _engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        engine = create_engine(url, connect_args={"timeout": SECONDS})

        @event.listens_for(engine, "connect")
        def _connected(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # the driver's own BEGIN would be deferred
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA synchronous=FULL")

    else:
        kept = f"-c synchronous_commit=on -c lock_timeout={SECONDS}s -c default_transaction_isolation=read\\ committed"
        engine = create_engine(url, pool_pre_ping=True, connect_args={"options": kept, "connect_timeout": 10})

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        locks = connection.get_execution_options().get("registry_lock")
        if url.drivername == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE" if locks else "BEGIN")
        elif locks:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")

    return engine


def _version(connection: Connection) -> str:
    """The version of the tables that are there; ``unknown`` where they are nobody's."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        rows = connection.exec_driver_sql("SELECT version_num FROM alembic_version").all()
        return str(rows[0][0]) if len(rows) == 1 and re.fullmatch(r"\d{4}", str(rows[0][0])) else "unknown"
    if not tables:
        return ""
    # As registries were before there were migrations.
    return "0001" if {"run", "round", "round_client", "log_leaf", "witnessed", "alias_event"} <= tables else "unknown"

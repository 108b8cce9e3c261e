"""Rounds as releases in the registry: aliases that point at them, holds that keep them, tombstones of adapters that were given up.

An alias moves by compare-and-set on its version. A guarded one moves only with a signature of its operator's key, which no coordinator
needs to hold: whoever has the coordinator's folder alone cannot release. Each move, hold and tombstone is a leaf in its own transaction.
Nothing here refunds privacy, and giving up an adapter takes back nothing that others have of it.
"""

from __future__ import annotations

from typing import Any

from cloister_shared.aliases import alias_move
from cloister_shared.errors import RefusedError, StateError
from sqlmodel import Session, select

from cloister_server.log import append, now
from cloister_server.logbook import LogBook
from cloister_server.operators import Operator, signed
from cloister_server.tables import COMMITTED, Alias, AliasEvent, Hold, Round, Run, Tombstone


class Releases(LogBook):
    """The registry, as far as releases go."""

    def alias(self, name: str) -> Alias | None:
        """Where an alias points now."""
        with self.database.reading() as session:
            return session.get(Alias, name)

    def aliases(self) -> list[Alias]:
        """Every alias, by name."""
        with self.database.reading() as session:
            return list(session.exec(select(Alias).order_by(Alias.name)))

    def alias_events(self, name: str) -> list[AliasEvent]:
        """Every move of an alias, oldest first."""
        with self.database.reading() as session:
            found = select(AliasEvent).where(AliasEvent.name == name).order_by(AliasEvent.version)  # type: ignore[arg-type]
            return list(session.exec(found))

    def set_alias(
        self,
        name: str,
        run: str,
        number: int,
        adapter: str,
        expected: int,
        why: str,
        *,
        rollback: bool = False,
        operator: Operator | None = None,
        guard: str | None = None,
    ) -> Alias:
        """Moves an alias, where it is at the version that the caller saw; the move is a leaf in the same transaction.

        Args:
            name: The alias.
            run: Where to: the run.
            number: And its round.
            adapter: That round's adapter.
            expected: The version that the caller saw; 0 for none.
            why: A word for the log.
            rollback: Whether it goes back.
            operator: Who signs it where it is guarded.
            guard: The public key, hex, that guards it from now on; empty for nobody's, None for whoever does now.

        Raises:
            StateError: Somebody moved it meanwhile, or the round is not committed with that adapter.
            RefusedError: It is guarded by another key.
        """
        with self.database.writing() as session:
            body, by = self._next(session, name, run, number, adapter, expected, rollback, guard)
            row = session.get(Alias, name) or Alias(name=name, run=run, number=number, adapter=adapter, version=0)
            if operator is not None and not by:
                raise StateError(
                    "nobody guards this alias: nobody's signature would be in the log",
                    where=name,
                    got=operator.whose,
                    mend="leave it out, or first: cloister rounds protect ALIAS --key KEY",
                )
            signature = signed(operator, by, alias_move(body), name) if by else ""
            row.run, row.number, row.adapter = run, number, adapter
            row.version, row.guard = body["version"], body["guard"]
            leaf = append(session, "alias_set", body | {"why": why, "operator": signature}, self.signing, at := now())
            session.add(row)
            session.add(AliasEvent(**row.model_dump(), rollback=rollback, why=why, at=at, leaf=leaf.index))
        return row

    def asked_move(
        self, name: str, run: str, number: int, adapter: str, expected: int, *, rollback: bool, guard: str | None
    ) -> bytes:
        """What the operator of a guarded alias would sign of such a move; nothing is written. Arguments as of ``set_alias``.

        Raises:
            StateError: It could not be made, or nobody need sign it.
        """
        with self.database.reading() as session:
            body, by = self._next(session, name, run, number, adapter, expected, rollback, guard)
        if not by:
            raise StateError("nobody guards this alias", where=name, expected="a guarded one", mend="leave out --ask")
        return alias_move(body)

    def _next(
        self,
        session: Session,
        name: str,
        run: str,
        number: int,
        adapter: str,
        expected: int,
        rollback: bool,
        guard: str | None,
    ) -> tuple[dict[str, Any], str]:
        """What a move's leaf will say, and the key that must sign it: empty where none must."""
        row, target = session.get(Alias, name), session.get(Round, (run, number))
        if (0 if row is None else row.version) != expected:
            got = "none" if row is None else f"move {row.version}, round {row.number} of run {row.run[:8]}"
            raise StateError("the alias was moved meanwhile", where=name, expected=f"move {expected}", got=got)
        if target is None or target.state != COMMITTED or target.adapter != adapter:
            raise StateError("only a committed round can be released", where=f"run {run[:8]} round {number}")
        if (grave := session.get(Tombstone, adapter)) is not None:
            raise StateError("its adapter was given up", where=f"run {run[:8]} round {number}", got=grave.why)
        present = "" if row is None else row.guard
        then = present if guard is None else guard
        body = {"log": self.origin, "alias": name, "run": run, "round": number, "adapter": adapter}
        # Whoever guards it from now on shows with the first move that the key is there.
        return body | {"version": expected + 1, "rollback": rollback, "guard": then}, present or then

    def hold(self, run: str, number: int, why: str) -> Hold:
        """Keeps a round's adapter whatever happens, until the hold is released.

        Raises:
            StateError: No such committed round, or its adapter was given up.
        """
        with self.database.writing() as session:
            adapter = _adapter_of(session, run, number)
            body = {"run": run, "round": number, "adapter": adapter, "why": why, "released": False}
            leaf = append(session, "hold", body, self.signing, at := now())
            row = Hold(run=run, number=number, adapter=adapter, why=why, at=at, leaf=leaf.index)
            session.add(row)
        return row

    def release_hold(self, hold: int, why: str) -> Hold:
        """Ends a hold.

        Raises:
            StateError: There is none, or it has ended.
        """
        with self.database.writing() as session:
            row = session.get(Hold, hold)
            if row is None or row.released is not None:
                raise StateError("no such hold", where=f"hold {hold}", got="none" if row is None else "released before")
            row.released = at = now()
            body = {"run": row.run, "round": row.number, "adapter": row.adapter, "why": why, "released": True}
            body["hold"] = row.leaf
            append(session, "hold", body, self.signing, at)
        return row

    def holds(self) -> list[Hold]:
        """Every hold, oldest first."""
        with self.database.reading() as session:
            return list(session.exec(select(Hold).order_by(Hold.id)))  # type: ignore[arg-type]

    def give_up(self, run: str, number: int, why: str) -> Tombstone:
        """Gives up a round's adapter: its row and leaf stay, its blob goes with the next ``registry gc``.

        Raises:
            StateError: No such committed round, or it was given up before.
            RefusedError: An alias, a hold or an unfinished run needs it.
        """
        with self.database.writing() as session:
            adapter = _adapter_of(session, run, number)
            where = f"run {run[:8]} round {number}"
            aliases = [a.name for a in session.exec(select(Alias).where(Alias.adapter == adapter))]
            held = session.exec(select(Hold).where(Hold.adapter == adapter))
            holds = [f"{h.id} (cloister rounds release {h.id})" for h in held if h.released is None]
            users = session.exec(select(Round).where(Round.adapter == adapter, Round.state == COMMITTED))
            running = sorted({r.run[:8] for r in users if session.get_one(Run, r.run).finished is None})
            named = (("alias", aliases), ("hold", holds), ("unfinished run", running))
            if needed := [f"{what} {', '.join(names)}" for what, names in named if names]:
                raise RefusedError("registry.needed", "the adapter is needed", where=where, got="; ".join(needed))
            body = {"run": run, "round": number, "adapter": adapter, "why": why}
            leaf = append(session, "tombstone", body, self.signing, at := now())
            row = Tombstone(adapter=adapter, run=run, number=number, why=why, at=at, leaf=leaf.index)
            session.add(row)
        return row

    def tombstones(self) -> dict[str, Tombstone]:
        """Adapters that were given up."""
        with self.database.reading() as session:
            return {row.adapter: row for row in session.exec(select(Tombstone))}


def _adapter_of(session: Session, run: str, number: int) -> str:
    row = session.get(Round, (run, number))
    if row is None or row.state != COMMITTED or not row.adapter:
        got = "no such round" if row is None else row.state
        raise StateError("not a committed round", where=f"run {run[:8]} round {number}", got=got)
    if session.get(Tombstone, row.adapter) is not None:
        raise StateError("its adapter was given up before", where=f"run {run[:8]} round {number}")
    return row.adapter

"""The groups of a run under secure aggregation: drawn with all sites, and how many hostile ones a rule over them stands.

A site whose commitment is malformed is left out of the draw; one that commits and does not reveal stops it, by name, since leaving it out
then would let whoever pulls its strings choose between two partitions.
"""

from __future__ import annotations

from dataclasses import asdict

from cloister_shared.draw import (
    Commitment,
    Reveal,
    Transcript,
    check_commitments,
    check_reveal,
    list_digest,
    read_commitments,
    read_reveal,
)
from cloister_shared.errors import InputError, RefusedError, VerificationError
from cloister_shared.sealing import OpeningKey

from cloister_server.context import Context, Exchange
from cloister_server.federation import Federation, of_rows
from cloister_server.intake import Reply
from cloister_server.robust import least
from cloister_server.talk import Talk

LEAST_SURVIVORS = 3
LEAST_FOR_BOTH = 12


def withstands(groups: int) -> int:
    """How many contaminated groups a robust rule stands: one attacker spoils one group."""
    return (groups - 1) // 2


def draw_groups(context: Context, link: Exchange, size: int) -> Transcript:
    """Draws a run's groups with all members that are online and commit as they should.

    Raises:
        RefusedError: A site that committed did not reveal, by name; or there are too few: start the run anew.
    """
    key, members, run = OpeningKey.generate(), {m.id: m for m in context.members}, context.run.id
    talk = Talk(context, link, key, 0, 1)
    commitments, reveals = dict[str, Commitment](), dict[str, Reveal]()
    try:
        for i, said in talk.ask("commit", {i: {} for i in members}, members):
            try:
                one = read_commitments({i: said})
                check_commitments(run, one)
                if one[i].records != members[i].card.records:
                    raise VerificationError(
                        "a commitment states another size than the card",
                        expected=str(members[i].card.records),
                        got=str(one[i].records),
                    )
                commitments |= one
            except VerificationError as error:  # costs its sender: the groups are drawn without it
                talk.refused[i] = Reply.unreadable(error)
        named = list_digest(run, size, commitments)
        shown = {"size": size, "commitments": {i: asdict(one) for i, one in commitments.items()}}
        for i, said in talk.ask("reveal", dict.fromkeys(commitments, shown), members):
            try:
                reveal = read_reveal(said)
                check_reveal(run, named, commitments[i], reveal)
                reveals[i] = reveal
            except VerificationError as error:
                talk.refused[i] = Reply.unreadable(error)
    finally:
        key.erase()
    if set(reveals) == set(commitments) and len(commitments) >= max(LEAST_SURVIVORS, context.federation.min_clients):
        transcript = Transcript(run, size, commitments, reveals)
        transcript.groups()
        return transcript
    lacking = {i: talk.refused.get(i) for i in members if i not in reveals}
    why = "; ".join(
        f"{members[i].card.name}: {reply.reason or reply.verdict if reply else 'no answer'}"
        for i, reply in lacking.items()
    )
    raise RefusedError(
        "secure.draw",
        "the groups could not be drawn",
        where=f"run {run[:8]}",
        expected=f"every site that commits reveals, and >= {max(LEAST_SURVIVORS, context.federation.min_clients)} do",
        got=f"{len(commitments)} committed, {len(reveals)} revealed ({why})"[:600],
        mend="see to those sites and their policies' peers, or revoke them, then start a new run",
    )


def groups_of(federation: Federation, sites: int) -> int:
    """How many groups so many sites make, after the defence is held against them.

    Raises:
        InputError: Too few sites for one group; or a robust rule beside fewer than ``LEAST_FOR_BOTH`` sites, or with more attackers
            than groups can stand.
    """
    size = federation.secure_group or sites
    groups, defence = max(1, sites // size), federation.defence
    where = f"{federation.path} [secure_aggregation]"
    if sites < size:
        raise InputError("too few sites for one group", where=where, expected=f">= {size} sites", got=str(sites))
    if defence.rule == "mean":
        return groups
    if sites < LEAST_FOR_BOTH:
        raise InputError(
            "so few sites can have secure aggregation or a robust rule, not both",
            where=f"{federation.path} [secure_aggregation], [defence]",
            expected=f">= {LEAST_FOR_BOTH} sites for both",
            got=f"{sites} sites, rule {defence.rule}",
            mend="leave out one of the two: of a resumed run [defence], for it keeps its [secure_aggregation]",
        )
    fewest = least(of_rows(defence.rule), defence.attackers)
    if defence.attackers > withstands(groups) or fewest > groups:
        raise InputError(
            "more attackers are assumed than groups can stand: one attacker spoils one group",
            where=f"{federation.path} [defence] attackers",
            expected=f"<= {withstands(groups)} with {groups} groups of {size}, and {fewest} groups for {defence.rule}",
            got=str(defence.attackers),
            mend="fewer attackers, smaller groups, or more sites",
        )
    return groups

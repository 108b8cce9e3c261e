"""The site policy: what the data owner allows, in a TOML file, and the check of a plan against it. Policy beats plan.

Every refusal names the rule, what was asked and what is allowed. The file is read at the agent's start and never from a peer.
It holds no budget state; ``budget`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloister_shared.encoding import canonical, parse_record, write_durably
from cloister_shared.errors import InputError, RefusedError, VerificationError
from cloister_shared.plan import PlanCore
from cloister_shared.settings import quote, read_toml
from cloister_shared.signing import VerifyKey
from cloister_shared.specs import REPORTS, TASK_KINDS

from cloister_client.standing import Limits


@dataclass(frozen=True)
class Policy:
    """What the data owner allows.

    Attributes:
        base_models: Digests of the base models that may be trained.
        tasks: Task kinds.
        target_modules: Names of layers that may carry LoRA.
        max_rank: Largest LoRA rank.
        epsilon_cap: Cap on the whole history's epsilon, for good.
        delta: Delta at which the cap holds.
        least_noise: Least noise multiplier; 0.1 or more (less protects nobody and takes minutes to account for).
        least_cohort: Fewest clients in a round's cohort, this one included.
        rounds_per_day: Most new rounds in any 24 hours.
        period_days: Length of a rolling period with a cap of its own, in days; 0 for none.
        period_epsilon_cap: Cap on epsilon within any such period; the lifetime cap holds beside it.
        nonprivate_releases: Names of un-noised numbers about the text that may leave; each is recorded.
        sandbox: ``required`` to refuse to start where the door cannot be shut, or ``preferred``.
        secure_aggregation: ``required`` where an update may leave under masks alone, or ``allowed``.
        peers: Signing keys, hex, of the other sites that the data owner accepts in a sum; others count for nothing there.
        draws_per_day: Most draws of groups for such sums in any 24 hours: one for each run.
        from_hour: From which hour of the day, UTC, a round may begin, 0 to 23.
        until_hour: Up to which hour, not included, 1 to 24; less than ``from_hour`` goes over midnight.
        layers: Layers that may carry LoRA; none for any.
        witnesses: Of how many of ``peers`` a cosignature of the coordinator's log is demanded before this site trains; -1 for one where
            peers are named, and none where they are not.
    """

    base_models: tuple[str, ...]
    tasks: tuple[str, ...]
    target_modules: tuple[str, ...]
    max_rank: int
    epsilon_cap: float
    delta: float
    least_noise: float
    least_cohort: int
    rounds_per_day: int
    sandbox: str
    period_days: int = 0
    period_epsilon_cap: float = 0.0
    nonprivate_releases: tuple[str, ...] = ()
    secure_aggregation: str = "allowed"
    peers: tuple[str, ...] = ()
    draws_per_day: int = 4
    from_hour: int = 0
    until_hour: int = 24
    layers: tuple[int, ...] = ()
    witnesses: int = -1

    @property
    def least_witnesses(self) -> int:
        """How many peers must have cosigned."""
        return min(1, len(self.peers)) if self.witnesses < 0 else self.witnesses

    @property
    def limits(self) -> Limits:
        """The part that the ledger enforces."""
        return Limits(self.epsilon_cap, self.delta, self.period_days, self.period_epsilon_cap)

    def to_toml(self) -> str:
        """The file's text."""

        def texts(values: tuple[str, ...]) -> str:
            return "[" + ", ".join(quote(v) for v in values) + "]"

        return f"""# What this organisation allows. The agent reads it at its start; a plan that asks for more is refused.
base_models = {texts(self.base_models)}
tasks = {texts(self.tasks)}
target_modules = {texts(self.target_modules)}
max_rank = {self.max_rank}
# Layers that may carry LoRA, by number; none for any.
layers = {list(self.layers)}
# The cap holds over the whole life of this site's text: all rounds, runs and models together.
epsilon_cap = {self.epsilon_cap!r}
delta = {self.delta!r}
least_noise = {self.least_noise!r}
least_cohort = {self.least_cohort}
rounds_per_day = {self.rounds_per_day}
# Hours of the day, UTC, in which a round may begin: from 0 to 23, until 1 to 24 (not included); over midnight where until is less.
from_hour = {self.from_hour}
until_hour = {self.until_hour}
# "required": updates leave under masks alone, in sums of at least least_cohort of the peers below beside this site.
secure_aggregation = {quote(self.secure_aggregation)}
# Signing keys of the sites that are accepted in such sums, and as witnesses, hex: cloister site peer CARD adds one.
peers = {texts(self.peers)}
# How many of these peers must have cosigned the coordinator's log before this site trains; -1: one where there are peers, else none.
witnesses = {self.witnesses}
# Most draws of groups for such sums in any 24 hours, one for each run: who may draw at will draws until a site sits among its own.
draws_per_day = {self.draws_per_day}
# A second cap within any so many days; 0 days for none. It never resets the first.
period_days = {self.period_days}
period_epsilon_cap = {self.period_epsilon_cap!r}
# Un-noised numbers about the text that may leave, by name: "loss". No budget covers them; each is recorded in the ledger.
nonprivate_releases = {texts(self.nonprivate_releases)}
# "required": do not start where the kernel cannot deny the agent the network.
sandbox = {quote(self.sandbox)}
"""


def read_policy(path: Path) -> Policy:
    """Reads ``policy.toml``.

    Raises:
        InputError: A key is missing, unknown or out of range.
    """
    table = read_toml(path, "policy")
    policy = Policy(
        base_models=table.texts("base_models"),
        tasks=table.texts("tasks", choices=TASK_KINDS),
        target_modules=table.texts("target_modules"),
        max_rank=table.integer("max_rank", 1, 256),
        epsilon_cap=table.number("epsilon_cap", 1e-6, 1000),
        delta=table.number("delta", 1e-10, 0.5),
        least_noise=table.number("least_noise", 0.1, 1000),
        least_cohort=table.integer("least_cohort", 1, 1_000_000),
        rounds_per_day=table.integer("rounds_per_day", 1, 1_000_000),
        sandbox=table.text("sandbox", choices=("required", "preferred")),
        period_days=table.integer("period_days", 0, 36_500, 0),
        period_epsilon_cap=table.number("period_epsilon_cap", 0, 1000, 0.0),
        nonprivate_releases=table.texts("nonprivate_releases", [], choices=REPORTS),
        secure_aggregation=table.text("secure_aggregation", "allowed", choices=("required", "allowed")),
        peers=table.texts("peers", []),
        draws_per_day=table.integer("draws_per_day", 1, 1_000_000, 4),
        from_hour=table.integer("from_hour", 0, 23, 0),
        until_hour=table.integer("until_hour", 1, 24, 24),
        layers=table.integers("layers", 0, 1000, []),
        witnesses=table.integer("witnesses", -1, 1000, -1),
    )
    table.finish()
    if (policy.period_days > 0) != (policy.period_epsilon_cap > 0):
        raise InputError(
            "a period needs a length and a cap",
            where=f"{path} period_days, period_epsilon_cap",
            expected="both above 0, or both 0",
            got=f"{policy.period_days} days, epsilon {policy.period_epsilon_cap:g}",
        )
    if policy.witnesses > len(policy.peers):
        raise InputError(
            "more witnesses are demanded than peers are named",
            where=f"{path} witnesses",
            expected=f"<= {len(policy.peers)}",
            got=str(policy.witnesses),
            mend="cloister site peer CARD, or fewer",
        )
    for key in policy.peers:
        try:
            VerifyKey.from_hex(key, f"{path} peers")
        except VerificationError as error:
            raise InputError(error.what, where=error.where, expected="64 hex digits", got=key[:20]) from error
    return policy


def add_peer(path: Path, key: str) -> tuple[str, ...]:
    """Writes one more accepted peer into ``policy.toml``, and nothing else; returns all.

    Raises:
        InputError: The file is malformed, or its ``peers`` are not on a line of their own.
    """
    policy = read_policy(path)
    if key in policy.peers:
        return policy.peers
    peers = (*policy.peers, key)
    lines = path.read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("peers = [") and line.rstrip().endswith("]")]
    if len(places) != 1:
        raise InputError(
            "the list of peers is not on one line of its own",
            where=f"{path} peers",
            expected='peers = ["…", "…"]',
            mend="add the key there by hand",
        )
    lines[places[0]] = f"peers = [{', '.join(quote(p) for p in peers)}]"
    write_durably(path, ("\n".join(lines) + "\n").encode(), mode=0o644)
    return peers


def note_peers(folder: Path, policy: Policy, now: float) -> str:
    """Compares the accepted peers with those at the agent's last start; a change is written to ``peers.log`` and returned in words."""
    path = folder / "peers.json"
    before = set(parse_record(path.read_bytes(), str(path))["peers"]) if path.is_file() else set()
    after = set(policy.peers)
    if before == after:
        return ""
    parts = [f"+{VerifyKey.from_hex(key, 'policy').id.hex()}" for key in sorted(after - before)]
    parts += [f"-{VerifyKey.from_hex(key, 'policy').id.hex()}" for key in sorted(before - after)]
    with (folder / "peers.log").open("a") as log:
        log.write(f"{now:.0f} {' '.join(parts)}\n")
    write_durably(path, canonical({"peers": sorted(after)}))
    return f"accepted peers changed: {' '.join(parts)}"


def within(policy: Policy, hour: int) -> bool:
    """Whether a round may begin in this hour of the day, UTC, 0 to 23."""
    first, last = policy.from_hour, policy.until_hour
    return first <= hour < last if first < last else hour >= first or hour < last


def check(policy: Policy, core: PlanCore, hour: int) -> None:
    """Checks a plan's work against the policy.

    Args:
        policy: What is allowed.
        core: What is asked.
        hour: The hour of the day, UTC, 0 to 23.

    Raises:
        RefusedError: A rule says no; ``rule`` names it.
    """

    def refuse(rule: str, what: str, allowed: object, asked: object) -> None:
        raise RefusedError(
            f"policy.{rule}",
            what,
            where=f"plan of round {core.round}",
            expected=str(allowed)[:200],
            got=str(asked)[:200],
            mend=f"change the plan, or {rule} in policy.toml",
        )

    if core.base not in policy.base_models:
        refuse(
            "base_models",
            "this base model is not allowed",
            ", ".join(d[:16] for d in policy.base_models),
            core.base[:16],
        )
    if core.task.kind not in policy.tasks:
        refuse("tasks", "this task is not allowed", ", ".join(policy.tasks), core.task.kind)
    if odd := sorted(set(core.task.target_modules) - set(policy.target_modules)):
        refuse("target_modules", "these layers may not carry LoRA", ", ".join(policy.target_modules), ", ".join(odd))
    if core.task.rank > policy.max_rank:
        refuse("max_rank", "the LoRA rank is too large", f"<= {policy.max_rank}", core.task.rank)
    others = sorted(set(core.task.layers) - set(policy.layers))
    if policy.layers and (others or not core.task.layers):
        allowed, asked = (", ".join(map(str, layers)) for layers in (policy.layers, others or ("all",)))
        refuse("layers", "these layers may not carry LoRA", allowed, asked)
    if not within(policy, hour):
        allowed = f"{policy.from_hour:02}:00 to {policy.until_hour:02}:00 UTC"
        refuse("from_hour", "no round may begin at this hour", allowed, f"{hour:02} h UTC")
    if policy.secure_aggregation == "required" and core.secure is None:
        refuse("secure_aggregation", "an update may leave under masks alone", "secure aggregation", "none")
    if core.training.noise_multiplier < policy.least_noise:
        refuse("least_noise", "too little noise", f">= {policy.least_noise}", core.training.noise_multiplier)
    if quiet := [n for n in core.noised if n.noise_multiplier < policy.least_noise]:
        what = f"too little noise on {quiet[0].name}"
        refuse("least_noise", what, f">= {policy.least_noise}", quiet[0].noise_multiplier)
    if core.training.delta != policy.delta:
        refuse("delta", "the plan states another delta than the policy", policy.delta, core.training.delta)
    if odd := sorted(set(core.reports) - set(policy.nonprivate_releases)):
        allowed = ", ".join(policy.nonprivate_releases) or "none"
        refuse("nonprivate_releases", "un-noised numbers may not leave", allowed, ", ".join(odd))
    if len(core.cohort) < policy.least_cohort:
        refuse("least_cohort", "the cohort is too small", f">= {policy.least_cohort}", len(core.cohort))

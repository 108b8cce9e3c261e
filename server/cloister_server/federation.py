"""A federation's settings (FEDERATION.toml), checked whole before anything is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloister_model.text import Source
from cloister_shared.cards import (
    check_name,
    split_address,
)
from cloister_shared.draw import LEAST_GROUP, MOST_GROUP
from cloister_shared.encoding import digest
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.settings import Table, parse_toml, read_toml
from cloister_shared.specs import (
    LINEAR_RULES,
    MAX_SCALE,
    MAX_WORDS,
    NOISED,
    REPORTS,
    RULES,
    TASK_KINDS,
    NoisedNumber,
    Rule,
    TaskSpec,
)

from cloister_server.robust import BY_COORDINATE, MIXED, least
from cloister_server.robust import RULES as RULES_OF_ROWS

# The recipe for a head on features of length 28, and for LoRA: bench/results has the tables they come from.
WORDS, HEAD_RATE = 4096, 0.6
CLIPPING_NORM = {"text-classification": 4.0, "causal-lm": 1.0}
SCHEDULES = ("constant", "linear")
# What the rule "auto" is, by whether sites add noise: set from measured tables (README), not by taste.
AUTO: dict[bool, Rule] = {True: "average", False: "average"}


@dataclass(frozen=True)
class ClientLevel:
    """Noise at the aggregator: differential privacy of a whole client against whoever sees rounds only.

    Attributes:
        noise_multiplier: Standard deviation of the noise on the sum over ``clipping_norm``.
        clipping_norm: L2 bound on one client's whole update; a constant, never a cohort's median.
        delta: Delta of the statement.
        epsilon_cap: Cap over all runs of this federation, for good.
    """

    noise_multiplier: float
    clipping_norm: float
    delta: float
    epsilon_cap: float


PIPELINE = "pipeline"
# What the pipeline ends with, and what the gate tries second.
STRONGEST = "nnm+geometric-median"


def of_rows(named: str) -> str:
    """The rule of ``robust`` that a defence's rule ends with."""
    return STRONGEST if named == PIPELINE else named


@dataclass(frozen=True)
class Defence:
    """What is done about hostile updates, beyond what each must be by itself.

    Attributes:
        rule: A rule of ``robust``, or ``pipeline``.
        attackers: How many clients of a cohort may be anything.
        margin: What a round may lose on held-out text, in accuracy (in loss where there is none), before its parent is
            kept; None for no gate.
        label_margin: What one label of held-out text may lose, in recall; None for no such gate.
        sites_margin: What a round may lose on the sites' own text, in nats a unit, before the next one takes it back; None for no
            such gate. It goes by ``parent_loss``, which sites tell with noise.
    """

    rule: str
    attackers: int
    margin: float | None
    label_margin: float | None = None
    sites_margin: float | None = None

    @property
    def gated(self) -> bool:
        """Whether a candidate is held against its parent on held-out text."""
        return self.margin is not None or self.label_margin is not None


@dataclass(frozen=True)
class Service:
    """The coordinator's own service.

    Attributes:
        address: ``host:port`` for enrolled sites, who show a certificate.
        enrolment: ``host:port`` for sites that have a token and no certificate yet.
        certificate_hours: How long a site's certificate lasts.
    """

    address: str
    enrolment: str
    certificate_hours: float


@dataclass(frozen=True)
class Federation:
    """FEDERATION.toml.

    Attributes:
        path: The file.
        digest: SHA-256 of its bytes, hex.
        name: The federation's name.
        address: ``host:port`` of the SuperLink.
        base: ``minilm`` or a folder.
        task: What is learnt.
        rule: Aggregation rule; never ``auto``.
        rounds: Rounds of a run.
        steps: DP-SGD steps per round and site.
        batch: Expected privacy units per step and site.
        reports: Un-noised numbers asked of sites beside their updates; each site's policy permits them or refuses.
        noised: Numbers asked of sites with noise.
        unit_records: Most records of one unit in a step, where a site's unit is a field.
        clipping_norm: L2 bound on one record's gradient.
        adapter_rate: Learning rate of LoRA (Adam).
        head_rate: Learning rate of the head (SGD).
        schedule: How both rates go over a run: ``constant``, or ``linear`` to a last round's share of the first.
        head_rounds: So many rounds train the head alone first; at most all.
        epsilon: Target for a whole run, or None where ``noise_multiplier`` is given.
        noise_multiplier: Noise multiplier, or None where ``epsilon`` is given.
        delta: Delta of every record-level statement.
        client_level: Noise at the aggregator, or None.
        defence: What is done about hostile updates.
        deadline: Seconds that a round waits.
        min_clients: Fewest accepted updates for a commit.
        held_out: Text to judge on, or None.
        public: Labelled text for everybody, which the head starts from, or None.
        secure_group: Under secure aggregation, least sites of a group; None without.
        service: Where sites enrol by token and ask the registry; None where keys are exchanged as files alone.
        storage: Where the registry lies: database and blobs, each empty for the coordinator's folder.
    """

    path: Path
    digest: str
    name: str
    address: str
    base: str
    task: TaskSpec
    rule: Rule
    rounds: int
    steps: int
    batch: int
    reports: tuple[str, ...]
    noised: tuple[NoisedNumber, ...]
    unit_records: int
    clipping_norm: float
    adapter_rate: float
    head_rate: float
    schedule: str
    head_rounds: int
    epsilon: float | None
    noise_multiplier: float | None
    delta: float
    client_level: ClientLevel | None
    defence: Defence
    deadline: float
    min_clients: int
    held_out: Source | None
    public: Source | None
    secure_group: int | None
    service: Service | None
    storage: tuple[str, str]


def _rule(table: Table, private: bool) -> Rule:
    wanted = table.text("rule", "auto", choices=("auto", *RULES))
    return next((rule for rule in RULES if rule == wanted), AUTO[private])


def _task(table: Table, rule: Rule) -> TaskSpec:
    kind = table.text("kind", choices=TASK_KINDS)
    causal = kind == "causal-lm"
    try:
        return TaskSpec(
            kind="causal-lm" if causal else "text-classification",
            labels=() if causal else table.texts("labels"),
            max_tokens=table.integer("max_tokens", 4, 4096, 64),
            target_modules=table.texts("target_modules", ["c_attn"] if causal else ["query", "value"]),
            layers=table.integers("layers", 0, 1000, []),
            rank=(rank := table.integer("rank", 1, 256, 8)),
            alpha=table.number("alpha", 1e-3, MAX_SCALE * rank, 2.0 * rank),
            freeze_a=rule == "freeze-a",
            words=0 if causal else table.integer("words", 0, MAX_WORDS, WORDS),
        )
    except VerificationError as error:
        raise InputError(error.what, where=table.where, got=error.got) from error


def _client_level(table: Table, rule: Rule) -> ClientLevel | None:
    if not table.written:
        return None
    if rule not in LINEAR_RULES:
        raise InputError(
            "this aggregation rule has no sensitivity that noise could be made for",
            where=table.where,
            expected=f"[aggregation] rule {' or '.join(LINEAR_RULES)}",
            got=rule,
        )
    return ClientLevel(
        noise_multiplier=table.number("noise_multiplier", 0.1, 1000),
        clipping_norm=table.number("clipping_norm", 1e-6, 1e6),
        delta=table.number("delta", 1e-10, 0.5, 1e-5),
        epsilon_cap=table.number("epsilon_cap", 1e-6, 1000),
    )


def _defence(table: Table, rule: Rule, client_level: bool, held_out: bool, told: bool) -> Defence:
    # Measured (README): what loses least to the attacks there, where there is held-out text to see harm on.
    named = table.text(
        "rule",
        PIPELINE if table.written else "mean",
        choices=(PIPELINE, *RULES_OF_ROWS, *(MIXED + r for r in RULES_OF_ROWS)),
    )
    margin = table.number("margin", 0, 1000) if table.has("margin") else None
    by_label = table.number("label_margin", 0, 1) if table.has("label_margin") else None
    if client_level and table.written:
        raise InputError(
            "client-level noise is made for a mean of cut updates, and for nothing that compares them",
            where=table.where,
            mend="leave out [defence] or [privacy.client_level]",
        )
    if rule == "exact" and named.removeprefix(MIXED) in BY_COORDINATE:
        raise InputError(
            "this rule goes by coordinate, which products have none of", where=f"{table.where} rule", got=named
        )
    if not (margin is None and by_label is None) and not held_out:
        raise InputError("a margin is measured on held-out text", where=f"{table.where} margin", mend="add [held_out]")
    attackers = table.integer("attackers", 0, 100_000, 0)
    by_sites = table.number("sites_margin", 0, 1000) if table.has("sites_margin") else None
    if by_sites is not None and not told:
        raise InputError(
            "the sites' gate goes by what sites tell of the parent",
            where=f"{table.where} sites_margin",
            expected="[noised] parent_loss",
            mend="add it: it is charged with each round",
        )
    return Defence(named, attackers, margin, by_label, by_sites)


def check_together(federation: Federation) -> None:
    """Sees that settings go together, those of a resumed run that it keeps with what the file says by now, too.

    Raises:
        InputError: They do not.
    """
    path, defence = federation.path, federation.defence
    fewest = least(of_rows(defence.rule), defence.attackers)
    # Under secure aggregation a rule is given groups, whose number is known when they are drawn.
    if federation.secure_group is None and fewest > federation.min_clients:
        # Told before anybody trains: such a round could only be held, and its work would be charged.
        raise InputError(
            "a round may have fewer updates than this defence can do with",
            where=f"{path} [defence] attackers",
            expected=f"[round] min_clients >= {fewest} for {defence.rule} at {defence.attackers} attackers",
            got=f"min_clients = {federation.min_clients}",
            mend="raise [round] min_clients, or lower attackers",
        )
    if federation.secure_group is not None and (federation.noised or federation.reports):
        raise InputError(
            "under masks only sums of updates are seen",
            where=str(path),
            expected="no [training] reports, no [noised] beside [secure_aggregation]",
            got=", ".join([*federation.reports, *(n.name for n in federation.noised)]),
            mend="leave them out, or start a new run without [secure_aggregation]",
        )
    if federation.head_rounds > federation.rounds:
        raise InputError(
            "more rounds for the head alone than rounds",
            where=f"{path} [training] head_rounds",
            expected=f"<= {federation.rounds}",
            got=str(federation.head_rounds),
            mend="lower it; a resumed run keeps the number of rounds that it began with",
        )


def _secure(table: Table, rule: Rule, client_level: bool, numbers: bool) -> int | None:
    if not table.written:
        return None
    if rule not in LINEAR_RULES or client_level or numbers:
        raise InputError(
            "under masks only sums of updates are seen",
            where=table.where,
            expected=f"[aggregation] rule {' or '.join(LINEAR_RULES)}, no [privacy.client_level], no reports, no [noised]",
            got=f"rule {rule}",
            mend="leave out [secure_aggregation], or the others",
        )
    return table.integer("group", LEAST_GROUP, MOST_GROUP, 4)


def _service(table: Table) -> Service | None:
    if not table.written:
        return None
    service = Service(
        table.text("address"), table.text("enrolment"), table.number("certificate_hours", 1e-3, 24 * 30, 24.0)
    )
    for name in ("address", "enrolment"):
        split_address(getattr(service, name), f"{table.where} {name}")
    if service.address == service.enrolment:
        raise InputError(
            "the two services need addresses of their own",
            where=f"{table.where} enrolment",
            got=service.enrolment,
            mend="another port",
        )
    return service


def _noised(table: Table) -> tuple[NoisedNumber, ...]:
    nats = table.number("loss_bound", 1e-3, 1e3, 4.0)
    bound = {"loss": nats, "parent_loss": nats, "units": 1.0}
    return tuple(NoisedNumber(n, table.number(n, 0.1, 1000), bound[n]) for n in NOISED if table.has(n))


def _own_text(table: Table, settings: Path, task: TaskSpec) -> Source | None:
    if not table.written:
        return None
    source = Path(table.text("path")).expanduser()
    return Source(
        source if source.is_absolute() else settings.parent / source,
        table.text("text"),
        table.text("label") if task.kind == "text-classification" else "",
    )


def read_federation(path: Path, begun: str | None = None) -> Federation:
    """Reads FEDERATION.toml.

    Args:
        path: The file.
        begun: What it said when a run began, to be read instead; None for the file as it is.

    Raises:
        InputError: A key is missing, unknown, of another type or out of range.
    """
    table = read_toml(path, "federation") if begun is None else parse_toml(begun.encode(), str(path), "federation")
    names = ("task", "training", "aggregation", "privacy", "round", "held_out", "public", "noised", "defence")
    task, training, aggregation, privacy, waiting, held, public, numbers, defence = map(table.table, names)
    secure, service, storage = (table.table(n) for n in ("secure_aggregation", "registry", "storage"))
    rule = _rule(aggregation, private=True)
    client_level = privacy.table("client_level")
    min_clients = waiting.integer("min_clients", 1, 1_000_000, 2)
    spec = _task(task, rule)
    federation = Federation(
        path=path.resolve(),
        digest=digest(path.read_bytes() if begun is None else begun.encode()),
        name=check_name(table.text("name"), str(path)),
        address=table.text("address"),
        base=table.text("base", "minilm"),
        task=spec,
        rule=rule,
        rounds=training.integer("rounds", 1, 100_000),
        steps=training.integer("steps", 1, 100_000),
        batch=training.integer("batch", 1, 1_000_000),
        reports=training.texts("reports", [], choices=REPORTS),
        noised=_noised(numbers),
        unit_records=training.integer("unit_records", 1, 1000, 16),
        clipping_norm=training.number("clipping_norm", 1e-3, 1e6, CLIPPING_NORM[spec.kind]),
        adapter_rate=training.number("adapter_rate", 0, 10, 1e-3),
        head_rate=training.number("head_rate", 0, 10, HEAD_RATE),
        schedule=training.text("schedule", "constant", choices=SCHEDULES),
        head_rounds=0 if spec.kind == "causal-lm" else training.integer("head_rounds", 0, 100_000, 0),
        epsilon=privacy.number("epsilon", 1e-3, 1000) if privacy.has("epsilon") else None,
        noise_multiplier=privacy.number("noise_multiplier", 0.1, 1000) if privacy.has("noise_multiplier") else None,
        delta=privacy.number("delta", 1e-10, 0.5, 1e-5),
        client_level=_client_level(client_level, rule),
        defence=_defence(
            defence,
            rule,
            bool(client_level.written),
            bool(held.written),
            "parent_loss" in numbers.written,
        ),
        deadline=waiting.number("deadline_seconds", 1, 7 * 86400, 1800),
        min_clients=min_clients,
        held_out=_own_text(held, path, spec),
        public=_own_text(public, path, spec),
        secure_group=_secure(
            secure, rule, bool(client_level.written), bool(numbers.written or "reports" in training.written)
        ),
        service=_service(service),
        storage=(storage.text("database", ""), storage.text("blobs", "")),
    )
    for part in (
        secure,
        service,
        storage,
        task,
        training,
        aggregation,
        client_level,
        privacy,
        waiting,
        held,
        public,
        numbers,
        defence,
        table,
    ):
        part.finish()
    if federation.noised and (federation.reports or federation.client_level is not None):
        raise InputError(
            "noised numbers stand neither beside un-noised ones nor beside client-level noise, which does not cover them",
            where=f"{path} [noised]",
            expected="no [training] reports, no [privacy.client_level]",
            got=", ".join(n.name for n in federation.noised),
        )
    if federation.public is not None and not spec.labels:
        raise InputError(
            "public text starts a head, and this task has none", where=f"{path} [public]", mend="leave it out"
        )
    check_together(federation)
    if federation.client_level is not None and federation.reports:
        raise InputError(
            "un-noised numbers of one client would stand beside client-level noise",
            where=f"{path} [training] reports",
            expected="no reports with [privacy.client_level]",
            got=", ".join(federation.reports),
        )
    split_address(federation.address, f"{path} address")
    if (federation.epsilon is None) == (federation.noise_multiplier is None):
        raise InputError(
            "say how much privacy",
            where=f"{path} [privacy]",
            expected="either epsilon or noise_multiplier",
            got="both or none",
        )
    return federation

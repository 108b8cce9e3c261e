"""The registry's tables: one word per idea, one row per fact. No rules here (``rules`` has those that the database itself holds)."""

from __future__ import annotations

from typing import Any

from cloister_shared.merkle import leaf_hash
from sqlalchemy import Dialect, LargeBinary, TypeDecorator
from sqlmodel import BigInteger, Field, SQLModel

# Planned: work is written down. Open: it is being sent. Aggregating: what came back is being made into a candidate.
PLANNED, OPEN, AGGREGATING, COMMITTED, ABORTED = "planned", "open", "aggregating", "committed", "aborted"
STATES = (PLANNED, OPEN, AGGREGATING, COMMITTED, ABORTED)
# A resumed run plans an unfinished round anew, from wherever it stood.
MOVES = (
    (PLANNED, OPEN),
    (OPEN, AGGREGATING),
    (AGGREGATING, COMMITTED),
    *((state, ABORTED) for state in (PLANNED, OPEN, AGGREGATING)),
    *((state, PLANNED) for state in (OPEN, AGGREGATING, ABORTED)),
)


class Bytes(TypeDecorator[bytes]):
    """A column of bytes. SQLite keeps in it what somebody put there by hand, text too: that is read as its bytes, which are then wrong."""

    impl, cache_ok = LargeBinary, True

    def process_result_value(self, value: Any, dialect: Dialect) -> bytes:
        """What was read, as bytes."""
        return value if isinstance(value, bytes) else str(value).encode()


class Blob(SQLModel, table=True):
    """A blob that some row names, written down in that row's transaction."""

    digest: str = Field(primary_key=True)
    kind: str  # adapter, mean, statement
    bytes: int = Field(sa_type=BigInteger)
    created: float


class Model(SQLModel, table=True):
    """A base model that runs trained on."""

    digest: str = Field(primary_key=True)  # of all pinned files
    source: str
    tokenizer: str  # digest of the tokeniser's files
    kind: str


class Leaf(SQLModel, table=True):
    """A leaf: the signed bytes, and who signed them. Never changed."""

    __tablename__ = "log_leaf"
    index: int = Field(primary_key=True)
    kind: str
    record: bytes = Field(sa_type=Bytes)
    key: str
    signature: str

    @property
    def hash(self) -> bytes:
        """Its hash, 32 bytes."""
        return leaf_hash(self.record)


class Witnessed(SQLModel, table=True):
    """The newest head of this log that a site cosigned, and the newest of the site's own log that it signed."""

    client: str = Field(primary_key=True)
    size: int = 0
    root: str = ""
    line: str = ""
    head_size: int = 0
    head: str = ""


class Run(SQLModel, table=True):
    """A run: what every round of it shares."""

    id: str = Field(primary_key=True)
    federation: str
    created: float
    rounds: int
    base: str
    task: str
    rule: str
    tensors: str
    config: str
    code: str
    tokenizer: str = ""
    flower_run: str | None = None  # Flower counts in unsigned 64 bits, SQLite in signed
    finished: float | None = None


class Round(SQLModel, table=True):
    """A round. Number 0 is the adapter that the run starts from."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    state: str = PLANNED
    attempt: int = 1
    parent: str | None = None
    adapter: str | None = None
    residual: float | None = None
    opened: float
    committed: float | None = None
    seconds: float = 0.0
    judging_seconds: float = 0.0
    sent_bytes: int = Field(default=0, sa_type=BigInteger)
    received_bytes: int = Field(default=0, sa_type=BigInteger)
    leaf: int | None = None  # of the commit, in the log
    fence: int = 0  # of the coordinator that wrote it last
    config: str = ""  # digest of the settings that this attempt went by
    code: str = ""
    lock: str = ""  # digest of the lock file that the code was installed with


class RoundClient(SQLModel, table=True):
    """What one client was asked in a round and what came of it."""

    __tablename__ = "round_client"
    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    client: str = Field(primary_key=True)
    name: str
    plan: str
    core: str
    verdict: str = "open"
    reason: str = ""
    weight: float
    update: str = ""
    noise_multiplier: float
    sample_rate: float
    steps: int
    epsilon: float = 0.0
    delta: float
    charged: int = 0
    sent_bytes: int = Field(default=0, sa_type=BigInteger)
    received_bytes: int = Field(default=0, sa_type=BigInteger)
    report: str = ""


class Metric(SQLModel, table=True):
    """A score of a round's adapter on the coordinator's held-out text."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    name: str = Field(primary_key=True)
    value: float


class NoisedSum(SQLModel, table=True):
    """A sum of client updates that noise was drawn for: the federation's ledger, whatever became of the round.

    Written before the noise is drawn; never changed. An attempt draws once. Nothing here is about a site's own ledger.
    """

    __tablename__ = "noised_sum"
    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    charged: float
    noise_multiplier: float
    clipping_norm: float
    noise_std: float  # of every element of the sum, whoever took part
    planned: int  # the denominator
    participants: int
    clients: str  # their ids, JSON
    delta: float
    epsilon: float = 0.0  # of all sums of this federation up to this one, at delta


class Evidence(SQLModel, table=True):
    """One test of one client's update against its cohort."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    client: str = Field(primary_key=True)
    test: str = Field(primary_key=True)
    code: str
    observed: float
    threshold: float
    median: float
    mad: float


class Draw(SQLModel, table=True):
    """The groups of a run under secure aggregation: its whole draw, from which anybody can check them. Never changed."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    transcript: str


class Opening(SQLModel, table=True):
    """For whom a group was asked to open its sum, in whatever attempt at a round: it opens for the same again and for no others.

    Written before the group is asked; the mean once it is known, so that it need not be asked again.
    """

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    group: str = Field(primary_key=True)
    clients: str  # ids of the living, JSON
    mean: str = ""  # digest of the mean's float32 bytes


class Summed(SQLModel, table=True):
    """What the coordinator saw of one group in a round under secure aggregation: the sum of these clients' updates, and no other."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    group: str = Field(primary_key=True)
    members: int
    clients: str  # ids of those in the sum, JSON


class Judgement(SQLModel, table=True):
    """What a round's defence did."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    rule: str
    attackers: int
    judged: int
    entered: int
    held: str  # why the parent was kept, empty where it was not
    shares: str  # what each client's update brought, JSON by client id; null where the rule goes by coordinate


class Alias(SQLModel, table=True):
    """A name that points at a committed round; moved by compare-and-set on ``version``."""

    name: str = Field(primary_key=True)
    run: str = Field(foreign_key="run.id")
    number: int
    adapter: str
    version: int
    guard: str = ""  # the operator's public key, hex: where there is one, each move is signed with it


class AliasEvent(SQLModel, table=True):
    """One move of an alias. Never changed."""

    __tablename__ = "alias_event"
    name: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    run: str
    number: int
    adapter: str
    rollback: bool
    why: str
    at: float
    leaf: int
    guard: str = ""


class Fence(SQLModel, table=True):
    """The newest coordinator's number: whoever holds a lower one writes no rounds."""

    id: int = Field(primary_key=True)
    number: int


class Privacy(SQLModel, table=True):
    """What a round cost: of one client's records, or of whole clients (``client`` empty). Two statements, never added up."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    client: str = Field(primary_key=True)
    scope: str = Field(primary_key=True)  # record, client
    unit: str
    epsilon: float  # of this run, up to this round
    delta: float
    lifetime: float  # of all that this federation asked, over all runs


class Signature(SQLModel, table=True):
    """A signed statement of a round, as its export has it."""

    statement: str = Field(primary_key=True)  # digest of the statement's blob
    key: str = Field(primary_key=True)
    run: str = Field(foreign_key="run.id")
    number: int
    signature: str
    at: float


class Hold(SQLModel, table=True):
    """A round that must be kept, whatever else would let its adapter go; released once, never deleted."""

    id: int | None = Field(default=None, primary_key=True)
    run: str = Field(foreign_key="run.id")
    number: int
    adapter: str
    why: str
    at: float
    leaf: int
    released: float | None = None


class Tombstone(SQLModel, table=True):
    """An adapter that was given up: its rounds stay, its blob may go. Never changed."""

    adapter: str = Field(primary_key=True)
    run: str
    number: int
    why: str
    at: float
    leaf: int

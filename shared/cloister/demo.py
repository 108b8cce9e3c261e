"""``cloister demo``: a whole federation on this machine, every part a process of its own, and a report.

Order: text (made here, or the user's) -> partition -> FEDERATION.toml -> coordinator and sites with keys exchanged by files ->
SuperLink, agents, relays, SuperNodes -> ``cloister run`` -> export -> report. It shows what an operator and the data owners would see: the
numbers per site are read from each agent's own status file, as its owner would.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cloister_client.data import add as add_text
from cloister_client.policy import Policy, add_peer
from cloister_client.site import enrol, held_up, read_site
from cloister_client.status import read_status
from cloister_client.supervise import Running
from cloister_client.train import choose_device
from cloister_client.units import normalised
from cloister_flower.bundle import build_bundle
from cloister_flower.control import Control
from cloister_model.base import find_base
from cloister_model.text import Source
from cloister_server.coordinator import Coordinator, admit_site, init, open_coordinator
from cloister_server.export import export_round
from cloister_server.federation import read_federation
from cloister_server.progress import event_line
from cloister_server.round_commands import round_rows, rounds_table
from cloister_server.store import Store
from cloister_shared import console
from cloister_shared.cards import CoordinatorCard, read_site_card
from cloister_shared.encoding import write_durably
from cloister_shared.errors import CloisterError, InputError, StateError
from cloister_shared.processes import Child, Group, free_port
from cloister_shared.settings import quote

from cloister.demo_screen import Screen, tail
from cloister.demo_text import Shares, own_shares, synthetic_shares, write_records

MARK = "demo"
_PUBLIC = """
[public]
path = "public.jsonl"
text = "text"
label = "label"
"""


_SECURE = """
[secure_aggregation]
group = {}
"""


@dataclass(frozen=True)
class Ask:
    """What was asked for: the command's options."""

    data: Path | None
    public: Path | None
    text: str
    label: str
    sites: int
    rounds: int
    partition: str
    epsilon: float
    steps: int
    batch: int
    seed: int
    device: str
    secure: bool


def federation_toml(shares: Shares, ask: Ask, port: int) -> str:
    """The demo's FEDERATION.toml."""
    rounds = ask.rounds
    labels = ", ".join(quote(label) for label in shares.labels)
    return f"""# Made by `cloister demo`; start from it for your own.
name = "demo"
address = "127.0.0.1:{port}"
base = "minilm"

[task]
kind = "text-classification"
labels = [{labels}]
max_tokens = 64
# LoRA on the top 2 of MiniLM's 6 layers: under DP fewer trained dimensions cost less accuracy.
target_modules = ["query", "value"]
layers = [4, 5]
rank = 8
alpha = 16

[training]
rounds = {rounds}
steps = {ask.steps}
batch = {ask.batch}
# The head's recipe (rate, clipping norm, hashed words) is the default: bench/results has the tables it comes from.
head_rounds = {rounds // 2}  # the head alone first, then LoRA below it too

[privacy]
# For a whole run, at every site.
epsilon = {ask.epsilon:g}
delta = 1e-5

[round]
deadline_seconds = 900
min_clients = {max(1, len(shares.sites) // 2)}

[held_out]
path = "held-out.jsonl"
text = "text"
label = "label"
{_PUBLIC if shares.public else ""}{_SECURE.format(min(4, len(shares.sites))) if ask.secure else ""}"""


def make_federation(home: Path, shares: Shares, ask: Ask) -> Coordinator:
    """Makes the coordinator's and the sites' folders and exchanges keys by files."""
    write_records(home / "held-out.jsonl", shares.held_out)
    if shares.public:
        write_records(home / "public.jsonl", shares.public)
    settings = home / "federation.toml"
    write_durably(settings, federation_toml(shares, ask, free_port()).encode(), mode=0o644)
    federation, base, bundle = read_federation(settings), find_base("minilm", "demo"), build_bundle()[1]
    card: CoordinatorCard = init(home / "coordinator", federation, base.digest, bundle)
    threads = max(1, (os.cpu_count() or 1) // len(shares.sites))
    for number, records in enumerate(shares.sites, 1):
        name = f"site-{number}"
        folder = home / "sites" / name
        text = home / "text" / f"{name}.jsonl"
        write_records(text, records)
        # The declared size is public: rounded, so that it does not state the true number of units (copies are one).
        declared = max(10, round(len({normalised(record.text) for record in records}), -1))
        policy = Policy(
            (base.digest,),
            ("text-classification",),
            ("query", "value"),
            8,
            ask.epsilon,
            federation.delta,
            0.3,
            2 if ask.secure else 1,
            1000,
            "preferred",
            secure_aggregation="required" if ask.secure else "allowed",
        )
        enrol(
            folder,
            name,
            card,
            policy,
            base="minilm",
            records=declared,
            runtime_port=free_port(),
            device=ask.device,
            threads=threads,
        )
        add_text(read_site(folder), Source(text.resolve(), "text", "label"))
        write_durably(folder / MARK, b"made by cloister demo\n", mode=0o644)
        admit_site(home / "coordinator", folder / "card.json")
    # Everybody's witness, and under secure aggregation everybody's company.
    cards = {folder: read_site_card(folder / "card.json") for folder in console.site_homes()}
    for folder, own in cards.items():
        for other in cards.values():
            if other is not own:
                add_peer(folder / "policy.toml", other.key)
    return open_coordinator(home / "coordinator")


def wait_superlink(coordinator: Coordinator, child: Child) -> None:
    """Waits until SuperLink answers.

    Raises:
        StateError: It ended or does not answer.
    """
    end = time.monotonic() + 60
    while True:
        if child.process.poll() is not None:
            raise StateError("SuperLink ended", where=str(child.log), got=child.error_line()[:300])
        try:
            with Control(coordinator.card.address, coordinator.ca, coordinator.token) as control:
                control.nodes()
        except StateError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return


def clean(home: Path) -> str | None:
    """Makes room for a demo in ``home``; returns a line where an earlier demo was removed.

    Raises:
        InputError: There is a federation that is not a demo's.
    """
    if not home.exists() or not any(home.iterdir()):
        return None
    if not (home / MARK).is_file():
        raise InputError("there is something here that no demo made", where=str(home), mend="choose another --home")
    real = sorted(p.name for p in home.glob("sites/*") if not (p / MARK).is_file())
    if real:
        raise InputError(
            "a site was enrolled in this demo's folder",
            where=str(home / "sites"),
            got=real[0],
            mend="choose another --home",
        )
    shutil.rmtree(home)
    return f"removed the earlier demo in {home} with its ledgers: a demo's budget starts anew, a real site's never does"


def run_demo(ask: Ask) -> None:
    """Runs the demo.

    Raises:
        CloisterError: Text or machine do not allow it, or the run failed.
    """
    started, root = time.monotonic(), console.OUTPUT.home
    shares = (
        synthetic_shares(ask.sites, ask.seed)
        if ask.data is None
        else own_shares(Source(ask.data, ask.text, ask.label), ask.sites, ask.partition, ask.seed, ask.public)
    )
    if ask.device == "cuda":
        choose_device(ask.device)
    note = clean(root)
    root.mkdir(parents=True, exist_ok=True)
    write_durably(root / MARK, b"made by cloister demo; removed by the next one\n", mode=0o644)
    what = (
        "synthetic customer feedback, made here, of nobody"
        if shares.synthetic
        else f"your text from {ask.data}, split {ask.partition}"
    )
    lines = [
        *([note] if note else []),
        f"Text: {what}: {sum(map(len, shares.sites)):,} records at {ask.sites} sites, "
        f"{len(shares.held_out)} held out, {len(shares.labels)} labels"
        + (f", and {len(shares.public)} public records that the head starts from" if shares.public else ""),
        "Starting SuperLink, and an agent, a relay and a SuperNode for each site …",
    ]
    console.emit(
        {
            "event": "demo",
            "removed": note or "",
            "synthetic": shares.synthetic,
            "sites": [len(s) for s in shares.sites],
            "held_out": len(shares.held_out),
            "public": len(shares.public),
            "labels": shares.labels,
        },
        lines,
    )
    coordinator = make_federation(root, shares, ask)
    with ExitStack() as held, Group() as group:
        superlink = group.start(
            "superlink",
            "cloister_server.superlink",
            ["--home", str(coordinator.home)],
            coordinator.home / "superlink.log",
        )
        running = []
        for number in range(1, ask.sites + 1):
            own = read_site(root / "sites" / f"site-{number}")
            held.enter_context(held_up(own.home))
            running.append(Running(own, Group()))
        try:
            for one in running:
                one.start_agent()
            child = start_run(group, coordinator, root)
            wait_superlink(coordinator, superlink)
            with Control(coordinator.card.address, coordinator.ca, coordinator.token) as control:
                for card in coordinator.sites():
                    control.register(card.node.encode(), card.name)
            for one in running:
                status = one.wait_agent()
                one.start_link()
                console.emit(
                    {"event": "site", "site": status.site, "device": status.device, "sandbox": status.sandbox},
                    f"  {status.site}: agent ready; {status.device}; {status.sandbox}",
                )
            if not console.OUTPUT.json:
                console.emit({}, "  NOT ISOLATED: in a demo agent and relay run as one user")
            follow(child, running)
        finally:
            for one in running:
                one.group.ask()
            for one in running:
                one.group.stop()
    report(root, coordinator, started, shares)


def start_run(group: Group, coordinator: Coordinator, root: Path) -> Child:
    """Starts ``cloister run``; it waits for the sites by itself."""
    arguments = ["--home", str(root), "run", str(coordinator.federation.path), "--json", "--wait", "180"]
    return group.start("run", "cloister.cli", arguments, coordinator.home / "run.log")


def follow(child: Child, running: Sequence[Running]) -> None:
    """Shows the run's events and the sites' progress until it ends.

    Raises:
        CloisterError: It failed; its own words.
    """
    screen, error = Screen(running), None
    for event in tail(child):
        if event is None:
            screen.tick()
            for one in running:
                one.check()
        elif "error" in event:
            error = event
        elif "event" in event:
            screen.clear()
            line = event_line(event["event"], event)
            if line or console.OUTPUT.json:
                console.emit(event, line or "")
    screen.clear()
    if child.process.returncode != 0:
        failure = (
            CloisterError(error["what"], **{k: error[k] for k in ("where", "expected", "got", "mend") if k in error})
            if error
            else StateError("the run ended without a word", where=str(child.log), got=child.error_line()[:300])
        )
        failure.exit_code = child.process.returncode
        raise failure


def report(root: Path, coordinator: Coordinator, started: float, shares: Shares) -> None:
    """The table of rounds, the export, and what to try next."""
    store = Store(coordinator.home)
    run = store.find_run(None)
    last = store.last_committed(run.id)
    folder = export_round(store, run, last.number, root / "export")
    rows = round_rows(store, run.id)
    columns, cells = rounds_table(rows)
    ledgers = {p.parent.name: read_status(p / "status.json") for p in sorted((root / "sites").glob("*/agent"))}
    seconds = time.monotonic() - started
    record = {
        "event": "report",
        "run": run.id,
        "rounds": rows,
        "export": str(folder),
        "seconds": seconds,
        "synthetic": shares.synthetic,
        "ledgers": {n: {"epsilon": s.epsilon, "cap": s.cap, "delta": s.delta} for n, s in ledgers.items()},
    }
    if not console.OUTPUT.json:
        print()
    console.table(
        record,
        f"Rounds of run {run.id[:8]} (scores on the coordinator's held-out text{', synthetic' if shares.synthetic else ''};"
        " epsilon of each site's whole history)",
        columns,
        cells,
    )
    if console.OUTPUT.json:
        return
    called = Path(sys.argv[0])
    name = str(called) if called.name == "cloister" and shutil.which("cloister") is None else "cloister"
    option = "" if root == console.default_home() else f" --home {root}"
    spent = ", ".join(f"{name} {s.epsilon:.3f} of {s.cap:g}" for name, s in ledgers.items())
    for line in (
        f"\nThe sites' own ledgers: {spent}, at delta {coordinator.federation.delta:g} per record (add/remove)",
        f"Exported adapter: {folder}",
        f"Took {seconds:.0f} s. Try next:",
        f"  {name} rounds show {last.number}{option}",
        f"  {name} privacy status{option}",
        f"  {name} rounds export 1{option}",
        f"  {name} audit export --out bundle.zip{option}",
    ):
        print(line)

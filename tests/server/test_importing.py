"""A round from one federation into another: everything of the export is checked, and nothing of it is registered where something is off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cloister_server.export import REGISTERED, export_round
from cloister_server.fsck import check
from cloister_server.importing import import_round
from cloister_server.rounds import run_rounds
from cloister_server.store import Store
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import CloisterError, InputError, StateError, VerificationError
from cloister_shared.merkle import Tree
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.statement import FILE, check_statement, make_statement

from support.server_world import World, make_world


@dataclass
class Two:
    """A federation whose round is exported, and another that takes it in."""

    world: World
    folder: Path
    other: Store
    key: VerifyKey
    base: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Two:
    """The export of a second round."""
    home = tmp_path_factory.mktemp("two")
    world = make_world(home / "one", tiny_bert, sites=2, rounds=2)
    run_rounds(world.context(), world.link)
    folder = export_round(world.store, world.run, 2, home / "export")
    return Two(world, folder, world.store, world.coordinator.signing.verify_key, world.run.base)


@pytest.fixture
def two(made: Two, tmp_path: Path) -> Two:
    """A copy of the export to work on, and an empty registry."""
    home = tmp_path / "other"
    home.mkdir()
    SigningKey.generate().save(home / "sign.key")
    shutil.copytree(made.folder, tmp_path / "export")
    return Two(made.world, tmp_path / "export", Store(home), made.key, made.base)


def take(two: Two) -> Any:
    return import_round(two.other, two.folder, two.key, "other", two.base)


def test_a_statement_says_what_the_round_is_and_what_it_cost(made: Two) -> None:
    stated = check_statement((made.folder / FILE).read_bytes(), made.key, "test")
    row = made.world.store.rounds(made.world.run.id)[2]
    assert (stated["run"], stated["round"], stated["adapter"]) == (made.world.run.id, 2, row.adapter)
    assert stated["code"].startswith("cloister ")
    assert len(stated["lock"]) == 64
    costs = {c.name: c.epsilon for c in made.world.store.clients(made.world.run.id, 2)}
    assert {c["name"]: c["lifetime"] for c in stated["privacy"]} == costs
    assert all(c["epsilon"] == c["lifetime"] and c["unit"] == "record" for c in stated["privacy"])
    assert set(stated["files"]) == {p.name for p in made.folder.iterdir() if p.name != FILE}
    # No path, address or setting of the coordinator is in what may be published.
    text = (made.folder / FILE).read_text() + (made.folder / "README.md").read_text()
    assert "127.0.0.1" not in text
    assert str(made.world.coordinator.home.parent) not in text
    card = (made.folder / "README.md").read_text()
    assert all(word in card for word in ("add/remove", "Accountant", stated["log"], "nothing is ever refunded"))
    assert "trained on text that never left the organisations that own it; 2 sites took part" in card
    untrained = export_round(made.world.store, made.world.run, 0, made.folder.parent / "first") / "README.md"
    assert "nothing was trained on anybody's text yet" in untrained.read_text()
    leaves = [json.loads(leaf.record) for leaf in made.world.store.leaves() if leaf.kind == "export"]
    assert leaves[0]["statement"] == digest((made.folder / FILE).read_bytes())


def test_an_export_is_registered_elsewhere_with_all_that_it_proves(two: Two) -> None:
    run = take(two)
    adapter = two.other.rounds(run.id)[0].adapter
    assert two.other.adapter(adapter or "") == (two.folder / REGISTERED).read_bytes()
    assert adapter == two.world.store.rounds(two.world.run.id)[2].adapter
    body = json.loads(two.other.leaves()[-1].record)
    assert (body["kind"], body["imported"]["run"], body["imported"]["round"]) == ("policy", two.world.run.id, 2)
    assert list(check(two.other)) == []
    two.other.set_alias("production", run.id, 0, adapter or "", 0, "")
    assert two.other.find_run(None).id == run.id  # there is no other here
    came = two.other.imported(run)
    assert came is not None
    assert (came["run"], came["round"], two.world.store.imported(two.world.run)) == (two.world.run.id, 2, None)
    with pytest.raises(StateError, match=f"imported before; got run {run.id[:8]}"):
        take(two)
    assert len(two.other.runs()) == 1
    # Passed on, it says where it comes from and claims no privacy of its own.
    again = export_round(two.other, run, 0, two.folder.parent / "again")
    card = (again / "README.md").read_text()
    assert "was imported" in card
    assert "trained on text" not in card
    assert two.world.run.id in card
    third = check_statement((again / FILE).read_bytes(), two.other.signing.verify_key, "test")
    assert third["imported"]["log"] == two.world.store.origin


def flip(name: str) -> Callable[[Two], None]:
    def change(two: Two) -> None:
        path = two.folder / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    return change


def drop(name: str) -> Callable[[Two], None]:
    return lambda two: (two.folder / name).unlink()


def restated(**changes: Any) -> Callable[[Two], None]:
    """Says something else and signs it with the federation's own key."""

    def change(two: Two) -> None:
        record = json.loads((two.folder / FILE).read_text())
        stated = record["statement"] | changes
        signing = two.world.coordinator.signing
        made = json.loads(make_statement(stated, two.world.store.proof(two.world.run.id, 2), signing))
        (two.folder / FILE).write_bytes(canonical(made))

    return change


def edited(*path: str, value: Any) -> Callable[[Two], None]:
    """Edits the file of the statement without any key."""

    def change(two: Two) -> None:
        record = json.loads((two.folder / FILE).read_text())
        inside = record
        for name in path[:-1]:
            inside = inside[name]
        inside[path[-1]] = value
        (two.folder / FILE).write_bytes(canonical(record))

    return change


def other_model(two: Two) -> None:
    """The signer itself puts another model beside the registered adapter, for PEFT to load."""
    path = two.folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    files = json.loads((two.folder / FILE).read_text())["statement"]["files"]
    restated(files=files | {"adapter_model.safetensors": digest(bytes(data))})(two)


def other_round(two: Two) -> None:
    """The proof of another round of the same log."""
    record = json.loads((two.folder / FILE).read_text())
    proof = two.world.store.proof(two.world.run.id, 1)
    made = make_statement(record["statement"], proof, two.world.coordinator.signing)
    (two.folder / FILE).write_bytes(made)


def forked(two: Two) -> None:
    """A head that the leaf is not in."""
    signing, store = two.world.coordinator.signing, two.world.store
    tree = Tree([bytes(32)] * 9)
    note = Checkpoint(store.origin, 9, tree.root()).signed(signing)
    edited("head", value=note)(two)


def cheaper(two: Two) -> None:
    """The signer itself states less than its leaf does."""
    costs = json.loads((two.folder / FILE).read_text())["statement"]["privacy"]
    restated(privacy=[c | {"epsilon": 0.0, "lifetime": 0.0} for c in costs])(two)


def costs(**changes: Any) -> Callable[[Two], None]:
    """The signer itself states other costs: of every site, or of one that never was."""

    def change(two: Two) -> None:
        stated = json.loads((two.folder / FILE).read_text())["statement"]["privacy"]
        one = "key" in changes
        restated(privacy=[*stated, stated[0] | changes] if one else [c | changes for c in stated])(two)

    return change


def one_more_file(two: Two) -> None:
    """What whoever loads the folder would run or unpickle, named by the signer."""
    (two.folder / "modeling_evil.py").write_bytes(b"x")
    files = json.loads((two.folder / FILE).read_text())["statement"]["files"]
    restated(files=files | {"modeling_evil.py": digest(b"x")})(two)


def linked(two: Two) -> None:
    """A link to the very same bytes."""
    path = two.folder / "README.md"
    path.rename(two.folder.parent / "elsewhere")
    path.symlink_to(two.folder.parent / "elsewhere")


CHANGES: dict[str, Callable[[Two], object]] = {
    "adapter": flip(REGISTERED),
    "what PEFT loads": flip("adapter_model.safetensors"),
    "head": flip("head.safetensors"),
    "card": flip("README.md"),
    "config": flip("adapter_config.json"),
    "no adapter": drop(REGISTERED),
    "no statement": drop(FILE),
    "no card": drop("README.md"),
    "other model, signed": other_model,
    "other base, signed": restated(base="00" * 32),
    "other task, signed": restated(run_task="{}"),
    "other tensors, signed": restated(run_tensors="[]"),
    "other adapter, signed": restated(adapter="11" * 32),
    "a file elsewhere, signed": restated(files={REGISTERED: "00" * 32, "../x": "00" * 32}),
    "no files, signed": restated(files={}),
    "other frozen A, signed": restated(frozen={"tensors": [], "digest": "00" * 32}),
    "other round": other_round,
    "fork": forked,
    "no costs, signed": restated(privacy=[]),
    "other scores, signed": restated(metrics={"accuracy": 0.99}),
    "other code, signed": restated(code="another"),
    "another log, signed": restated(log="cloister/federation/x"),
    "a field too many, signed": restated(extra=1),
    "frozen of another type, signed": restated(frozen=17),
    "federation's name, signed": restated(federation="x\n## Privacy\nepsilon 0"),
    "less epsilon, signed": cheaper,
    "run epsilon of nothing, signed": costs(epsilon=0.0),
    "run epsilon of another type, signed": costs(epsilon=False),
    "run epsilon beyond numbers, signed": costs(epsilon=10**400, lifetime=10**400),
    "another unit, signed": costs(unit="nothing of anybody"),
    "a unit of another type, signed": costs(unit={}),
    "a site that never was, signed": costs(key="ab" * 16, name="ghost"),
    "another accountant, signed": restated(accountant="none"),
    "other neighbours, signed": restated(neighbours="none"),
    "a file that no export makes, signed": one_more_file,
    "a file that nobody named": lambda two: (two.folder / "adapter_model.bin").write_bytes(b"x"),
    "a link": linked,
    "less epsilon": edited("statement", "privacy", value=[]),
    "signature": edited("signature", value="00" * 64),
    "leaf": edited("leaf", "record", value="{}"),
    "index": edited("leaf", "index", value=0),
    "index of another type": edited("leaf", "index", value="1"),
    "path": edited("path", value=[]),
    "format": edited("format", value="cloister-round/9"),
    "key": edited("key", value="00" * 32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_was_changed_is_registered(two: Two, change: str) -> None:
    CHANGES[change](two)
    with pytest.raises(CloisterError) as caught:
        take(two)
    assert isinstance(caught.value, VerificationError | InputError)
    assert two.other.runs() == []
    assert two.other.leaves() == []


def test_another_federations_key_and_another_base_model_take_nothing_in(two: Two) -> None:
    with pytest.raises(VerificationError, match="another federation"):
        import_round(two.other, two.folder, SigningKey.generate().verify_key, "other", two.base)
    with pytest.raises(VerificationError, match="another base model"):
        import_round(two.other, two.folder, two.key, "other", "00" * 32)
    assert two.other.runs() == []


def test_a_federations_own_export_is_not_imported(two: Two) -> None:
    store = two.world.store
    with pytest.raises(InputError, match="own"):
        import_round(store, two.folder, store.signing.verify_key, "fed", two.base)
    assert list(check(store)) == []


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_an_export_is_the_same_in_every_process(two: Two, seed: str) -> None:
    """PEFT keeps target modules as a set, whose order goes by the process's hash seed."""
    program = (
        "import sys; from pathlib import Path; from cloister_server.store import Store; from cloister_server.export import *\n"
        "store = Store(Path(sys.argv[1])); run = store.find_run(None)\n"
        "task, schema = TaskSpec.from_dict(json.loads(run.task)), Schema.from_list(json.loads(run.tensors), 'x')\n"
        "vector = from_safetensors(store.adapter(store.rounds(run.id)[2].adapter), schema, 'x')\n"
        "print(digest(peft_files(run, task, schema, vector)['adapter_config.json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(two.world.store.home)],
        env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split()[-1] == digest((two.folder / "adapter_config.json").read_bytes())

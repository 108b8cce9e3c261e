"""Export of a registered round as a PEFT folder: adapter, head, labels, and a card that says how to load it.

    adapter_config.json  adapter_model.safetensors  head.safetensors (classification)  cloister.json  README.md
    registered.safetensors (the adapter as the registry has it)  statement.json (signed, with the log's proof)

Written into a temporary folder beside the target and renamed, so that a crash leaves none that is half there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cloister_model.build import lora_config
from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import InputError, StateError, VerificationError
from cloister_shared.frozen_a import FORMAT as FROZEN_FORMAT
from cloister_shared.frozen_a import frozen_digest, frozen_tensors
from cloister_shared.privacy import ACCOUNTANT, NEIGHBOURS
from cloister_shared.specs import TaskSpec, centre_and_spread
from cloister_shared.statement import FILE, Proof, make_statement
from cloister_shared.vectors import F32, Schema, from_safetensors, to_safetensors

from cloister_server.accounting import client_level_of
from cloister_server.export_card import card_text
from cloister_server.fsck import check_charges, check_rounds
from cloister_server.store import Store
from cloister_server.tables import COMMITTED, Round, RoundClient, Run

REGISTERED, ADAPTER = "registered.safetensors", "adapter_model.safetensors"
CARDS = ("README.md", "cloister.json")
# Every file of an export beside its statement.
FILES = frozenset({REGISTERED, ADAPTER, "head.safetensors", "adapter_config.json", *CARDS})


def frozen_parts(run: Run) -> dict[str, F32]:
    """LoRA's A where the run froze it, by name: recomputed, since no round holds it; nothing where A is trained.

    Raises:
        VerificationError: What is recomputed is not what the run trained with.
    """
    frozen = json.loads(run.config)["frozen"]
    if frozen is None:
        return {}
    schema = Schema.from_list(frozen["tensors"], "registry")
    if (got := frozen_digest(run.base, schema)) != frozen["digest"]:
        raise VerificationError(
            "the frozen A is not the one that the run trained with",
            where=f"run {run.id[:8]}",
            expected=frozen["digest"][:16],
            got=got[:16],
            mend=f"export with the version that made the run: {run.code}",
        )
    return frozen_tensors(run.base, schema)


def export_round(store: Store, run: Run, number: int, out: Path) -> Path:
    """Writes the folder ``out``, which must not exist, and registers the export.

    Returns:
        The folder.

    Raises:
        InputError: No such committed round, or the folder is there.
        VerificationError: The blob is missing or changed, rows are not what the log says, or a frozen A cannot be recomputed.
        StateError: The folder cannot be written, or the adapter was given up meanwhile.
    """
    row = next((r for r in store.rounds(run.id) if r.number == number and r.state == COMMITTED), None)
    if row is None or row.adapter is None:
        raise InputError(
            "no such committed round",
            where=f"run {run.id[:8]}",
            expected=f"0 to {store.last_committed(run.id).number}",
            got=str(number),
        )
    if (grave := store.tombstones().get(row.adapter)) is not None:
        raise InputError("its adapter was given up", where=f"run {run.id[:8]} round {number}", got=grave.why)
    # What is signed of the round are rows, and those of the rounds before it: they must be what their leaves say.
    check_rounds(store, run, range(number + 1))
    check_charges(store, run, number)
    if os.path.lexists(out):
        raise InputError("the folder is there already", where=str(out), mend="choose another --out")
    schema = Schema.from_list(json.loads(run.tensors), "registry")
    registered = store.adapter(row.adapter)
    task = TaskSpec.from_dict(json.loads(run.task))
    vector = from_safetensors(registered, schema, "registered adapter")
    files, proof = peft_files(run, task, schema, vector), store.proof(run.id, number)
    stated = statement_of(store, run, row, proof) | {"vector": digest(vector.tobytes())}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent))
    except OSError as error:
        raise StateError("no folder can be made there", where=str(out), got=error.strerror or "") from error
    try:
        card, short = card_text(stated, task.labels).encode(), _short(stated, task)
        files |= {REGISTERED: registered} | dict(zip(CARDS, (card, short), strict=True))
        stated["files"] = {name: digest(data) for name, data in files.items()}
        statement = make_statement(stated, proof, store.signing)
        for name, data in (files | {FILE: statement}).items():
            write_durably(temp / name, data, mode=0o644)
        temp.chmod(0o755)
        store.add_statement(run.id, number, statement, store.signing.verify_key.raw.hex())
        temp.rename(out)
    except OSError as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise StateError("the folder cannot be written", where=str(out), got=error.strerror or "") from error
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return out


def peft_files(run: Run, task: TaskSpec, schema: Schema, vector: F32) -> dict[str, bytes]:
    """The files that PEFT and a head's user load, by name; the same round always gives the same bytes.

    Raises:
        VerificationError: A frozen A cannot be recomputed.
    """
    parts, fixed = schema.split(vector), dict(frozen_parts(run))
    if task.labels:
        fixed["head.centre"], fixed["head.spread"] = centre_and_spread(
            task, parts["head.weight"].shape[1], "registered task"
        )
    parts |= fixed
    tensors = (*((n, a.shape) for n, a in fixed.items()), *schema.tensors)
    config = lora_config(task)
    config.inference_mode = True
    config.fan_in_fan_out = json.loads(run.config)["fan_in_fan_out"]
    config.base_model_name_or_path = None
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    # PEFT keeps the modules as a set, whose order is another in each process.
    said = json.loads(files["adapter_config.json"])
    said["target_modules"] = sorted(said["target_modules"])
    files["adapter_config.json"] = json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"
    for name, prefix in ((ADAPTER, ""), ("head.safetensors", "head.")):
        chosen = [(n, s) for n, s in tensors if n.startswith("head.") == bool(prefix)]
        if chosen:
            part = Schema(tuple((n.removeprefix(prefix), s) for n, s in chosen))
            joined = part.join({n.removeprefix(prefix): parts[n] for n, _ in chosen})
            files[name] = to_safetensors(joined, part, {"format": "pt"})
    return files


def statement_of(store: Store, run: Run, row: Round, proof: Proof) -> dict[str, Any]:
    """What is stated of a round, apart from its files; what its leaf says is taken from the leaf."""
    leaf, config = json.loads(proof.record), json.loads(run.config)
    costs = {(p.client, p.number): p for p in store.privacy(run.id) if p.scope == "record"}
    # Whoever's text may be in the adapter: of all rounds up to this one, each site as it stood after its last.
    clients = dict[str, RoundClient]()
    for number in range(1, row.number + 1):
        asked = store.clients(run.id, number)
        clients |= {c.client: c for c in asked if number == row.number or c.charged or c.verdict == "accepted"}
    return {
        "federation": run.federation,
        "log": store.origin,
        "leaf": proof.index,
        "round": row.number,
        **{
            name: leaf.get(name)
            for name in ("run", "adapter", "base", "tokenizer", "rule", "task", "tensors", "config")
        },
        "settings": leaf.get("settings", ""),
        "code": leaf.get("code", run.code),
        "lock": leaf.get("lock", ""),
        "parent": leaf.get("parent"),
        "residual": leaf.get("residual"),
        "committed": leaf.get("at"),
        "imported": leaf.get("imported"),
        "run_task": run.task,
        "run_tensors": run.tensors,
        "frozen": config["frozen"],
        "fan_in_fan_out": config["fan_in_fan_out"],
        "frozen_a": FROZEN_FORMAT if config["frozen"] is not None else None,
        "metrics": leaf.get("metrics", {}),
        "accountant": ACCOUNTANT,
        "neighbours": NEIGHBOURS,
        "client_level": client_level_of(store, run.id, row.number),
        "privacy": [
            {
                "name": c.name,
                "key": c.client,
                "round": c.number,
                "verdict": c.verdict,
                "plan": c.plan,
                "unit": costs[c.client, c.number].unit if (c.client, c.number) in costs else "not said",
                # Rounds from before there was a statement by run have the lifetime alone, which is never less.
                "epsilon": costs[c.client, c.number].epsilon if (c.client, c.number) in costs else c.epsilon,
                "lifetime": c.epsilon,
                "delta": c.delta,
                "noise_multiplier": c.noise_multiplier,
                "sample_rate": c.sample_rate,
                "steps": c.steps,
            }
            for c in sorted(clients.values(), key=lambda c: c.name)
        ],
    }


def _short(stated: dict[str, Any], task: TaskSpec) -> bytes:
    """What a program that loads the folder needs, apart from the statement."""
    kept = (
        "federation",
        "run",
        "round",
        "adapter",
        "base",
        "rule",
        "residual",
        "frozen_a",
        "metrics",
        "client_level",
        "vector",
    )
    record = {name: stated[name] for name in kept} | {
        "task": task.kind,
        "labels": list(task.labels),
        "max_tokens": task.max_tokens,
        "words": task.words if task.labels else None,
        "clients": [
            {k: c[k] for k in ("name", "key", "verdict", "epsilon", "lifetime", "delta", "plan")}
            for c in stated["privacy"]
        ],
    }
    return json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"

"""A round of another federation, from its export: everything that the statement says is checked before anything of it is registered.

    key (from elsewhere) -> statement's signature -> log's head and inclusion proof -> the leaf says the same -> what is kept of it
    -> the files' names -> each file's digest -> the adapter's tensors -> the same base model as here
    -> registered as round 0 of a run of its own

A folder with anything that the statement does not name is refused. No privacy of this federation's sites is touched by it; what it cost its
own sites stands in the statement, which is kept.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloister_shared.encoding import digest
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.signing import VerifyKey
from cloister_shared.specs import RULES, TaskSpec
from cloister_shared.statement import FILE, check_statement
from cloister_shared.vectors import Schema, check_bounded, from_safetensors

from cloister_server.export import ADAPTER, CARDS, FILES, REGISTERED, peft_files
from cloister_server.store import Origin, Store
from cloister_server.tables import Model, Run

MAX_BYTES = 1 << 30
# Of files that hold words: a few hundred bytes a site.
_MOST = {FILE: 1 << 26} | dict.fromkeys((*CARDS, "adapter_config.json"), 1 << 20)
# What is kept of a statement, and shown to people and programs for good.
_FORMS = {"run": "[0-9a-f]{32}", "tokenizer": "([0-9a-f]{64})?", "rule": "|".join(RULES)}
_MOST_ROUNDS = 1_000_000


def import_round(store: Store, folder: Path, key: VerifyKey, federation: str, base: str) -> Run:
    """Registers an exported round; returns the run that it is round 0 of.

    Args:
        store: This federation's registry.
        folder: The export.
        key: The other federation's key, from elsewhere than the export.
        federation: This federation's name.
        base: Digest of this federation's base model.

    Raises:
        InputError: The folder is not an export.
        VerificationError: Something does not hold.
        StateError: It was imported before.
    """
    if key.raw == store.signing.verify_key.raw:
        raise InputError(
            "this round is this federation's own", where=str(folder), mend="cloister rounds promote ALIAS ROUND"
        )
    data = _read(folder, FILE)
    stated = check_statement(data, key, f"{folder}/{FILE}")
    where = str(folder)
    if stated["base"] != base:
        raise VerificationError(
            "it was trained on another base model", where=where, expected=base[:16], got=stated["base"][:16]
        )
    _plain(stated, where)
    if REGISTERED not in stated["files"]:
        raise VerificationError("the statement names no adapter", where=where, expected=REGISTERED)
    # Before any of them is read. Whoever loads a folder runs or unpickles what it finds there.
    if extra := sorted(set(stated["files"]) - FILES):
        raise VerificationError("files that no export makes", where=where, got=", ".join(map(repr, extra))[:200])
    try:
        unnamed = sorted({p.name for p in folder.iterdir()} - set(stated["files"]) - {FILE})
    except OSError as error:
        raise InputError("not an export", where=where, got=str(error)) from error
    if unnamed:
        raise VerificationError("files that the statement does not name", where=where, got=", ".join(unnamed)[:200])
    files = {name: _named(folder, name, str(named)) for name, named in sorted(stated["files"].items())}
    adapter = files[REGISTERED]
    task_text, tensors_text = stated["run_task"], stated["run_tensors"]
    pairs = (("adapter", adapter), ("task", task_text.encode()), ("tensors", tensors_text.encode()))
    if odd := [name for name, got in pairs if digest(got) != stated[name]]:
        raise VerificationError("its parts are not what its leaf says", where=where, got=", ".join(odd))
    try:
        task, schema = TaskSpec.from_dict(json.loads(task_text)), Schema.from_list(json.loads(tensors_text), where)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VerificationError("its task or its tensors cannot be read", where=where, got=str(error)[:120]) from error
    vector = from_safetensors(adapter, schema, f"{folder}/{REGISTERED}")
    check_bounded(vector, schema, f"{folder}/{REGISTERED}")
    frozen = {"fan_in_fan_out": stated["fan_in_fan_out"], "frozen": stated["frozen"]}
    run = Run(
        id=secrets.token_hex(16),
        federation=federation,
        created=(now := time.time()),
        rounds=0,
        base=base,
        task=task_text,
        rule=stated["rule"],
        tensors=tensors_text,
        config=json.dumps({"settings": "", "client_level": None, "public": None} | frozen),
        code=stated["code"],
        tokenizer=stated["tokenizer"] or "",
        finished=now,
    )
    # What PEFT loads must be the registered adapter itself, whatever its signer put beside it.
    try:
        _fits(stated["frozen"], files.get(ADAPTER, b""), where)
        made = peft_files(run, task, schema, vector) | {REGISTERED: adapter}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VerificationError("its frozen A cannot be read", where=where, got=str(error)[:120]) from error
    if stated["vector"] != digest(vector.tobytes()):
        raise VerificationError("it states another vector than its adapter has", where=where)
    if extra := sorted(set(files) - set(made) - set(CARDS)):
        raise VerificationError("files that no export of this round makes", where=where, got=", ".join(extra))
    if odd := [name for name, data in made.items() if files.get(name) != data]:
        raise VerificationError("what PEFT would load is not the registered adapter", where=where, got=", ".join(odd))
    said = {name: stated[name] for name in ("federation", "log", "run", "round", "leaf")}
    model = Model(digest=base, source="imported", tokenizer=run.tokenizer, kind=task.kind)
    store.start_run(run, adapter, model, Origin(data, key.raw.hex(), said))
    return run


def _plain(stated: Mapping[str, Any], where: str) -> None:
    """Sees that what is kept of a statement is of its form: it is shown at a terminal, and signed again with an export from here.

    Raises:
        VerificationError: It is not.
    """
    odd = [name for name, form in _FORMS.items() if not re.fullmatch(form, stated[name] or "")]
    if not stated["code"].isprintable() or len(stated["code"]) > 200:
        odd.append("code")
    if type(stated["round"]) is not int or not 0 <= stated["round"] <= _MOST_ROUNDS:
        odd.append("round")
    if odd:
        raise VerificationError("fields that no federation states so", where=where, got=", ".join(odd))


def _fits(frozen: Mapping[str, Any] | None, adapter: bytes, where: str) -> None:
    """Sees that a frozen A is one that the file for PEFT can hold, before it is laid out.

    Raises:
        VerificationError: It is not.
    """
    size = 0 if frozen is None else 4 * Schema.from_list(frozen["tensors"], where).size
    if size > len(adapter):
        raise VerificationError(
            "its frozen A is larger than what PEFT would load", where=where, expected=f"<= {len(adapter)} bytes",
            got=str(size),
        )  # fmt: skip


def _named(folder: Path, name: str, named: str) -> bytes:
    data = _read(folder, name)
    if digest(data) != named:
        raise VerificationError(
            "a file was changed", where=str(folder / name), expected=named[:16], got=digest(data)[:16]
        )
    return data


def _read(folder: Path, name: str) -> bytes:
    path, most = folder / name, _MOST.get(name, MAX_BYTES)
    try:
        # Neither a link to somewhere else, nor a device or a pipe that never ends.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError("not an export", where=str(path), got="not a plain file")
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise InputError("not an export", where=str(path), got=getattr(error, "strerror", "") or str(error)) from error
    if len(data) > most:
        raise InputError("a file of it is too large", where=str(path), expected=f"<= {most} bytes")
    return data

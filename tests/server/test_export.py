"""An exported folder loads with PEFT alone and computes what the registered adapter does."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloister_model.base import find_base
from cloister_model.build import build, load_vector, read_vector
from cloister_model.tokens import encode
from cloister_server.export import export_round
from cloister_server.federation import read_federation
from cloister_server.store import Commit, Store
from cloister_server.tables import RoundClient, Run
from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import InputError, StateError, VerificationError
from cloister_shared.frozen_a import frozen_a
from cloister_shared.statement import FILE
from cloister_shared.vectors import F32, Schema, to_safetensors
from safetensors.torch import load_file

from support.registry import blob_path, planned
from support.server_world import start_store, write_federation

TEXTS = ["my card was charged twice", "the parcel has not arrived please help", "x"]
FROZEN = {"[aggregation]": '[aggregation]\nrule = "freeze-a"'}
CAUSAL = {"kind": 'kind = "causal-lm"', "labels": "", "target_modules": 'target_modules = ["c_attn"]'}


@dataclass
class Made:
    """A registry with a committed round 1 whose adapter is random and nowhere zero."""

    store: Store
    run: Run
    schema: Schema
    vector: F32
    base: Path
    settings: Path


def make(home: Path, base: Path, **changes: str) -> Made:
    """Makes it."""
    settings = write_federation(home / "F.toml", base, **changes)
    federation = read_federation(settings)
    store, run, schema = start_store(home, federation, find_base(str(base), "test"), 2)
    vector = np.asarray(np.random.default_rng(4).normal(0, 0.5, schema.size), dtype=np.float32)
    asked = RoundClient(
        run=run.id,
        number=1,
        client="ab" * 16,
        name="site-1",
        plan="cd" * 32,
        core="{}",
        weight=1.0,
        noise_multiplier=2.5,
        sample_rate=0.25,
        steps=2,
        delta=1e-5,
    )
    planned(store, run.id, 1, [asked])
    blob = store.blobs.put(to_safetensors(vector, schema, {"round": "1"}))
    clients = {"ab" * 16: {"verdict": "accepted", "epsilon": 1.2345}}
    store.commit_round(run.id, 1, Commit(blob, 1.0, 0.1, clients, {"accuracy": 0.625}))
    return Made(store, run, schema, vector, base, settings)


@pytest.fixture
def classify(tmp_path: Path, tiny_bert: Path) -> Made:
    """A classifier's registry."""
    return make(tmp_path / "c", tiny_bert)


def expected_logits(made: Made) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and logits of our own model with the registered vector."""
    federation, base = read_federation(made.settings), find_base(str(made.base), "test")
    model = build(base, federation.task, "test")
    load_vector(model, made.vector)
    model.eval()
    ids, mask, _ = encode(base, TEXTS, [0] * len(TEXTS), federation.task.max_tokens).batch(range(len(TEXTS)))
    with torch.no_grad():
        return ids, mask, model(ids, mask)


GUARD = """import sys
for name in ("cloister", "cloister_model", "cloister_shared", "cloister_server", "cloister_client", "cloister_flower"):
    sys.modules[name] = None
"""


def readme_code(made: Made, folder: Path) -> str:
    """The README's code, on the tiny base, with texts and results as JSON."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "cloister" not in code.replace("cloister.json", "")
    return (
        code.replace('"BASE"', repr(str(made.base)))
        .replace('["some text"]', repr(TEXTS))
        .replace("print(labels[logits.argmax(-1).item()])", "found = json.dumps([labels, logits.tolist()])")
    )


def run_here(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: object) -> list[Any]:
    """Runs the README's code in the exported folder, in this process; it imports nothing of ours."""
    monkeypatch.chdir(folder)
    space: dict[str, Any] = dict(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the README leaves closing its file to Python
        exec(code, space)
    found = json.loads(space["found"])
    assert isinstance(found, list)
    return found


def run_outside(code: str, folder: Path) -> list[Any]:
    """Runs it in another process, where no code of Cloister can be imported."""
    command = [sys.executable, "-c", f"{GUARD}{code}\nprint(found)"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


def test_the_readme_code_gives_the_registered_classifier(tmp_path: Path, classify: Made) -> None:
    folder = export_round(classify.store, classify.run, 1, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "cloister.json",
        "head.safetensors",
        "registered.safetensors",
        "statement.json",
    ]
    labels, logits = run_outside(readme_code(classify, folder), folder)
    assert labels == ["billing", "delivery"]
    _, _, wanted = expected_logits(classify)
    np.testing.assert_allclose(np.array(logits), wanted.numpy(), atol=1e-5)
    heads = sum(int(np.prod(shape)) for name, shape in classify.schema.tensors if name.startswith("head."))
    # The adapter matters: the base with the bare head says something else.
    zero = build(find_base(str(classify.base), "test"), read_federation(classify.settings).task, "test")
    load_vector(zero, np.where(np.arange(classify.schema.size) < classify.schema.size - heads, 0, classify.vector))
    ids, mask, _ = expected_logits(classify)
    with torch.no_grad():
        assert float((zero.eval()(ids, mask) - wanted).abs().max()) > 1e-2


def test_the_readme_code_gives_the_registered_language_model(
    tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "g", tiny_gpt2, **CAUSAL)
    folder = export_round(made.store, made.run, 1, tmp_path / "out")
    assert not (folder / "head.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert json.loads((folder / "cloister.json").read_text())["labels"] == []
    ids, mask, wanted = expected_logits(made)
    code = readme_code(made, folder) + (
        "\nimport json, torch\nwith torch.no_grad():\n    logits = model(input_ids=ids, attention_mask=mask).logits\n"
        "found = json.dumps([logits.tolist()])\n"
    )
    (logits,) = run_here(code, folder, monkeypatch, ids=ids, mask=mask)
    shown = mask.bool().numpy()
    np.testing.assert_allclose(np.array(logits)[shown], wanted.numpy()[shown], atol=1e-5)


def test_a_frozen_a_is_exported_and_peft_gives_the_same_logits(
    tmp_path: Path, tiny_bert: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "c", tiny_bert, **FROZEN)
    assert not [n for n, _ in made.schema.tensors if "lora_A" in n]
    folder = export_round(made.store, made.run, 1, tmp_path / "out")
    found = load_file(folder / "adapter_model.safetensors")
    for name, part in found.items():
        if "lora_A" in name:
            wanted = frozen_a(made.run.base, name, tuple(part.shape))
            assert part.numpy().tobytes() == wanted.tobytes()
    assert sum("lora_A" in n for n in found) == sum("lora_B" in n for n in found) == 4
    _, logits = run_here(readme_code(made, folder), folder, monkeypatch)
    np.testing.assert_allclose(np.array(logits), expected_logits(made)[2].numpy(), atol=1e-5)
    assert "`freeze-a`; A was not trained" in (folder / "README.md").read_text()
    assert json.loads((folder / "cloister.json").read_text())["frozen_a"] == "cloister-frozen-a/1"

    made = make(tmp_path / "g", tiny_gpt2, **(CAUSAL | FROZEN))
    folder = export_round(made.store, made.run, 1, tmp_path / "out-g")
    ids, mask, wanted_logits = expected_logits(made)
    code = readme_code(made, folder) + (
        "\nimport json, torch\nwith torch.no_grad():\n    logits = model(input_ids=ids, attention_mask=mask).logits\n"
        "found = json.dumps([logits.tolist()])\n"
    )
    (logits,) = run_here(code, folder, monkeypatch, ids=ids, mask=mask)
    shown = mask.bool().numpy()
    np.testing.assert_allclose(np.array(logits)[shown], wanted_logits.numpy()[shown], atol=1e-5)


def test_a_frozen_a_of_another_derivation_refuses_the_export(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version that derives it otherwise must not export another model under the round's name."""
    made = make(tmp_path / "c", tiny_bert, **FROZEN)
    monkeypatch.setattr("cloister_shared.frozen_a.FORMAT", "cloister-frozen-a/2")
    with pytest.raises(VerificationError, match="frozen A is not the one"):
        export_round(made.store, made.run, 1, tmp_path / "out" / "x")
    assert left(tmp_path / "out") == []


def test_only_the_chosen_layers_are_exported(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "l", tiny_bert, rank="rank = 3\nlayers = [1]")
    folder = export_round(made.store, made.run, 1, tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["layers_to_transform"], config["r"], config["lora_alpha"]) == ([1], 3, 4.0)
    assert config["base_model_name_or_path"] is None
    _, logits = run_here(readme_code(made, folder), folder, monkeypatch)
    np.testing.assert_allclose(np.array(logits), expected_logits(made)[2].numpy(), atol=1e-5)


def test_the_record_says_what_was_spent(tmp_path: Path, classify: Made) -> None:
    folder = export_round(classify.store, classify.run, 1, tmp_path / "out")
    record = json.loads((folder / "cloister.json").read_text())
    assert (record["run"], record["round"], record["labels"]) == (classify.run.id, 1, ["billing", "delivery"])
    assert record["base"] == find_base(str(classify.base), "test").digest
    assert record["adapter"] == classify.store.last_committed(classify.run.id).adapter
    assert record["vector"] == digest(classify.vector.tobytes())
    assert record["metrics"] == {"accuracy": 0.625}
    assert record["clients"][0]["epsilon"] == 1.2345
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| site-1 | not said | 1 | 1.2345 | 1.2345 | 1e-05 | 2.5 | 0.25 | 2 | accepted |" in card
    assert "accuracy 0.6250" in card
    assert str(classify.base) not in "".join(p.read_text() for p in folder.glob("*.json"))


def test_round_zero_is_the_untouched_model(tmp_path: Path, classify: Made) -> None:
    folder = export_round(classify.store, classify.run, 0, tmp_path / "out")
    record = json.loads((folder / "cloister.json").read_text())
    model = build(find_base(str(classify.base), "test"), read_federation(classify.settings).task, "test")
    first = read_vector(model)
    assert (record["round"], record["clients"], record["metrics"]) == (0, [], {})
    # LoRA's A is random at the start, its B and the head are zero.
    assert record["vector"] != digest(classify.vector.tobytes())
    assert len(first) == classify.schema.size


def left(folder: Path) -> list[str]:
    """Everything in a folder, hidden too."""
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_folder_that_is_there_is_refused(tmp_path: Path, classify: Made) -> None:
    out = tmp_path / "out" / "x"
    out.mkdir(parents=True)
    (out / "mine").write_text("mine")
    with pytest.raises(InputError, match="already"):
        export_round(classify.store, classify.run, 1, out)
    assert left(out) == ["mine"]
    assert left(out.parent) == ["x"]


@pytest.mark.parametrize("number", [2, -1, 99])
def test_only_committed_rounds_are_exported(tmp_path: Path, classify: Made, number: int) -> None:
    planned(classify.store, classify.run.id, 2)
    with pytest.raises(InputError, match="no such committed round") as caught:
        export_round(classify.store, classify.run, number, tmp_path / "out" / "x")
    assert "0 to 1" in caught.value.expected
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_changed_blob_refuses_the_export(tmp_path: Path, classify: Made, at: int) -> None:
    path = blob_path(classify.store, classify.store.last_committed(classify.run.id).adapter)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="changed"):
        export_round(classify.store, classify.run, 1, tmp_path / "out" / "x")
    assert left(tmp_path / "out") == []


def test_an_adapter_of_another_schema_refuses_the_export(tmp_path: Path, classify: Made) -> None:
    other = Schema((("encoder.x", (classify.schema.size,)),))
    blob = classify.store.blobs.put(to_safetensors(classify.vector, other, {}))
    planned(classify.store, classify.run.id, 2)
    classify.store.commit_round(classify.run.id, 2, Commit(blob, 1.0, 0.0, {}, {}))
    with pytest.raises(VerificationError, match="other tensors"):
        export_round(classify.store, classify.run, 2, tmp_path / "out" / "x")
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_failure_leaves_nothing_half_written(
    tmp_path: Path, classify: Made, monkeypatch: pytest.MonkeyPatch, after: int, fault: BaseException
) -> None:
    count = [0]

    def failing(path: Path, data: bytes, *, mode: int = 0o600) -> None:
        if count[0] == after:
            raise fault
        count[0] += 1
        write_durably(path, data, mode=mode)

    monkeypatch.setattr("cloister_server.export.write_durably", failing)
    with pytest.raises(StateError if isinstance(fault, OSError) else type(fault)):
        export_round(classify.store, classify.run, 1, tmp_path / "out" / "x")
    assert left(tmp_path / "out") == []
    monkeypatch.undo()
    assert export_round(classify.store, classify.run, 1, tmp_path / "out" / "x").is_dir()


def test_an_export_is_repeatable(tmp_path: Path, classify: Made) -> None:
    one = export_round(classify.store, classify.run, 1, tmp_path / "one")
    two = export_round(classify.store, classify.run, 1, tmp_path / "two")
    for path in one.iterdir():
        if path.name != FILE:
            assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    # The log has grown by the first export: another head and proof, the same statement under the same signature.
    first, second = (json.loads((folder / FILE).read_text()) for folder in (one, two))
    assert {k: first[k] for k in ("statement", "signature", "leaf")} == {
        k: second[k] for k in ("statement", "signature", "leaf")
    }

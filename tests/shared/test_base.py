"""Base models: pinned by digest, from safetensors only."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cloister_model.base import MINILM_WEIGHTS, WEIGHTS, BaseModel, find_base
from cloister_model.build import build
from cloister_model.tokens import encode
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.specs import TaskSpec

from support.tiny import make_tiny_bert

TASK = TaskSpec("text-classification", ("a", "b"), 32, ("query", "value"), (), 2, 4.0)


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "base"))


def test_digest_is_of_the_list_of_digests(folder: Path) -> None:
    base = find_base(str(folder), "w")
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    expected = [[n, hashlib.sha256((folder / n).read_bytes()).hexdigest()] for n in names]
    assert base.digest == digest(canonical(expected))
    assert base.path == folder.resolve()


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_digest_changes_with_every_file(folder: Path, name: str) -> None:
    before = find_base(str(folder), "w")
    with (folder / name).open("ab") as handle:
        handle.write(b" ")
    after = find_base(str(folder), "w")
    assert after.digest != before.digest
    before.check(before.digest, "w")
    with pytest.raises(VerificationError, match="another digest") as caught:
        after.check(before.digest, "policy.toml base")
    assert (caught.value.where, caught.value.got) == ("policy.toml base", after.digest)


def test_digest_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert find_base(str(other), "w").digest == find_base(str(folder), "w").digest


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_folder_without_a_needed_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match="not a base model folder") as caught:
        find_base(str(folder), "federation.toml base")
    assert caught.value.where == "federation.toml base"
    assert name in caught.value.got
    (folder / name).mkdir()
    with pytest.raises(InputError):
        find_base(str(folder), "w")


def test_folder_with_only_a_pickle_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError):
        find_base(str(folder), "w")
    with pytest.raises((OSError, InputError)):
        build(BaseModel(folder, ()), TASK, "w")


def test_pickle_beside_the_weights_is_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    assert build(find_base(str(folder), "w"), TASK, "w").head is not None


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none"), "", "no-such-model"):
        with pytest.raises(InputError):
            find_base(source, "w")


def test_packaged_weights_are_the_upstream_file() -> None:
    base = find_base("minilm", "w")
    assert dict(base.files)[WEIGHTS] == MINILM_WEIGHTS
    assert set(dict(base.files)) >= {WEIGHTS, "config.json", "tokenizer.json"}


def test_file_that_changes_the_tokens_changes_the_digest(folder: Path) -> None:
    before = find_base(str(folder), "w")
    tokens = encode(before, ["my card was charged"], [0], 32).ids
    (folder / "added_tokens.json").write_text(json.dumps({"card was": 200}))
    try:
        after = find_base(str(folder), "w")
    except InputError:
        return
    assert after.digest != before.digest or encode(after, ["my card was charged"], [0], 32).ids == tokens


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_file_that_changes_the_weights_changes_the_digest(folder: Path, tmp_path: Path) -> None:
    before = find_base(str(folder), "w")
    task = replace(TASK, target_modules=("dense",))
    weights = build(before, task, "w").state_dict()
    other = tmp_path / "other"
    other.mkdir()
    make_tiny_bert(other, seed=1)
    donor = build(find_base(str(other), "w"), TASK, "w")
    donor.encoder.peft_config["default"].base_model_name_or_path = str(other)
    donor.encoder.save_pretrained(str(tmp_path / "adapter"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder)
    try:
        after = find_base(str(folder), "w")
    except InputError:
        return
    name = "encoder.base_model.model.embeddings.word_embeddings.weight"
    assert after.digest != before.digest or torch.equal(build(after, task, "w").state_dict()[name], weights[name])

"""What is kept of the frozen layers: the same result with and without, bounded, private, gone when it should be."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client import activations
from cloister_client.activations import Activations, spare_bytes
from cloister_client.train import Device, Trainer
from cloister_model.base import find_base
from cloister_model.build import build, load_vector, read_vector, schema_of
from cloister_model.prefix import Prefix, frozen_prefix
from cloister_model.tokens import Encoded
from cloister_shared.specs import TaskSpec
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from support.client_oracle import apart, flat, make_trainer, summed
from support.client_world import BERT_TASK, GPT2_TASK, LABELS, random_vector, spec

TOP = {
    "bert": ("tiny_bert", replace(BERT_TASK, layers=(1,))),
    "gpt2": ("tiny_gpt2", replace(GPT2_TASK, layers=(1,))),
}
ROWS = (7, 0, 3, 11, 4, 8, 9)
SPEC = spec(clipping_norm=0.1)


@pytest.fixture(params=TOP)
def made(request: pytest.FixtureRequest) -> tuple[Trainer, Encoded]:
    """A trainer of the top layer, and its data."""
    fixture, task = TOP[request.param]
    return make_trainer(request.getfixturevalue(fixture), task)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does."""
    monkeypatch.setattr(activations, "spare_bytes", lambda: None)


def _kept(trainer: Trainer) -> Activations:
    assert trainer.activations is not None
    return trainer.activations


class _Counted:
    """Counts the records that go through the frozen layers."""

    def __init__(self, store: Activations) -> None:
        self.records = 0
        self._enter = store.prefix.enter
        store.prefix.enter = self.enter  # type: ignore[method-assign]

    def enter(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The real states."""
        self.records += len(input_ids)
        return self._enter(input_ids, attention_mask)


def _without(trainer: Trainer, data: Encoded, rows: Iterable[int]) -> dict[str, Tensor]:
    store, trainer.activations = trainer.activations, None
    out = summed(trainer, SPEC, data, rows)
    trainer.activations = store
    return out


def test_the_sum_is_the_same_with_and_without(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    expected = _without(trainer, data, ROWS)
    for _ in range(2):  # filling, then from what is kept
        assert apart(summed(trainer, SPEC, data, ROWS), expected) < 1e-5
    assert _kept(trainer).kept == len(ROWS)


def test_rounding_to_float16_moves_the_sum_by_a_thousandth_at_most(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    expected = flat(_without(trainer, data, ROWS))
    _kept(trainer).stored = torch.float16
    error = float((flat(summed(trainer, SPEC, data, ROWS)) - expected).norm() / expected.norm())
    assert 0 < error < 1e-3


def test_rounding_on_the_real_base_is_far_below_any_noise() -> None:
    task = TaskSpec("text-classification", LABELS, 48, ("query", "value"), (4, 5), 8, 16.0)
    trainer, data = make_trainer("minilm", task)
    load_vector(trainer.model, random_vector(schema_of(trainer.model), scale=0.05))
    expected = flat(_without(trainer, data, ROWS))
    _kept(trainer).stored = torch.float16
    error = float((flat(summed(trainer, SPEC, data, ROWS)) - expected).norm() / expected.norm())
    assert 0 < error < 1e-3


def test_each_record_is_computed_once_and_only_when_sampled(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    counted = _Counted(_kept(trainer))
    for rows in ((0, 1), (1, 2), (2, 0, 1)):
        summed(trainer, SPEC, data, rows)
    assert counted.records == 3
    assert _kept(trainer).kept == 3


def test_what_is_kept_is_bounded_and_the_rest_is_computed_anew(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    store = _kept(trainer)
    expected = _without(trainer, data, ROWS)
    longest = max(len(data.ids[row]) for row in ROWS)
    store.limit = longest * 32 * 4
    for _ in range(2):
        assert apart(summed(trainer, SPEC, data, ROWS), expected) < 1e-5
    assert 0 < store.kept < len(ROWS)
    assert store.bytes <= store.limit
    store.forget()
    store.limit = 0
    assert apart(summed(trainer, SPEC, data, ROWS), expected) < 1e-5
    assert (store.kept, store.bytes) == (0, 0)


def test_kept_or_not_a_record_gives_the_same_states(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    store = _kept(trainer)
    store.stored = torch.float16
    first = store.states(data, (3,))
    again = store.states(data, (3,))
    store.forget()
    store.limit = 0
    assert torch.equal(first, again)
    assert torch.equal(store.states(data, (3,)), first)
    assert first.dtype == torch.float32


def test_it_stops_growing_when_memory_is_short(made: tuple[Trainer, Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = made
    store = _kept(trainer)
    expected = _without(trainer, data, ROWS)
    monkeypatch.setattr(activations, "BLOCK_BYTES", 4096)
    store.states(data, (0,))
    kept = store.kept
    monkeypatch.setattr(activations, "spare_bytes", lambda: 10_000)
    assert apart(summed(trainer, SPEC, data, ROWS), expected) < 1e-5
    assert kept <= store.kept < len(ROWS)
    assert store.bytes <= 2 * 4096


def test_spare_memory_is_told_by_this_system() -> None:
    spare = spare_bytes()
    assert spare is None or 0 <= spare < 1 << 50


def test_forgetting_overwrites_and_other_data_are_never_mixed(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    store = _kept(trainer)
    summed(trainer, SPEC, data, ROWS)
    blocks = list(store._blocks)
    assert any(float(b.abs().max()) > 0 for b in blocks)
    trainer.forget()
    assert all(float(b.abs().max()) == 0 for b in blocks)
    assert (store.kept, store.bytes) == (0, 0)
    summed(trainer, SPEC, data, ROWS)
    other = Encoded(tuple(reversed(data.ids)), tuple(reversed(data.labels)), data.pad)
    mirrored = [len(data) - 1 - row for row in ROWS]
    assert apart(summed(trainer, SPEC, other, mirrored), _without(trainer, data, ROWS)) < 1e-5
    assert store.kept == len(ROWS)


def test_dropping_the_store_overwrites(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    store = Activations(_kept(trainer).prefix)
    store.states(data, ROWS)
    blocks = list(store._blocks)
    assert any(float(b.abs().max()) > 0 for b in blocks)
    del store
    gc.collect()
    assert all(float(b.abs().max()) == 0 for b in blocks)


def test_a_trainer_starts_with_nothing_kept(made: tuple[Trainer, Encoded]) -> None:
    assert (_kept(made[0]).kept, _kept(made[0]).bytes) == (0, 0)


def _overflowing(enter: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Only long records overflow float16, so that something was kept in it before."""

    def larger(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return enter(input_ids, attention_mask) * (1e6 if input_ids.shape[1] > 12 else 1.0)

    return larger


def test_a_record_beyond_float16_changes_no_other_record(made: tuple[Trainer, Encoded]) -> None:
    """Precision chosen by what the text is would let one record move the gradients of all others."""
    trainer, data = made
    store = _kept(trainer)
    store.stored = torch.float16
    enter = store.prefix.enter
    store.prefix.enter = _overflowing(enter)  # type: ignore[assignment, method-assign]
    lengths = [len(ids) for ids in data.ids]
    short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
    assert lengths[short] <= 12 < lengths[long]
    before = store.states(data, (short,))[0, : lengths[short]].clone()
    both = store.states(data, (short, long))
    assert store.stored == torch.float16
    assert store.kept == 2
    assert torch.equal(both[0, : lengths[short]], before)
    most = torch.finfo(torch.float16).max
    assert torch.isfinite(both).all()
    assert float(both[1].abs().max()) == most


def test_bf16_autocast_with_and_without(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    trainer.device = Device("cpu", True, "")
    _kept(trainer).stored = torch.float16
    expected = flat(_without(trainer, data, ROWS))
    got = flat(summed(trainer, SPEC, data, ROWS))
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_a_round_uses_it_and_gives_the_same_update_apart_from_noise(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    parent = read_vector(trainer.model)
    quiet = spec(steps=3, sample_rate=1.0, noise_multiplier=1e-6)
    counted = _Counted(_kept(trainer))
    moved = trainer.run(quiet, parent, data, lambda *_: None)
    assert counted.records == len(data)
    trainer.activations = None
    plain = trainer.run(quiet, parent, data, lambda *_: None)
    assert float(np.mean(np.abs(moved - plain) > 1e-4)) < 0.1


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_where_the_lowest_layer_is_trained_there_is_nothing_to_keep(request: pytest.FixtureRequest, name: str) -> None:
    fixture, task = TOP[name]
    base = find_base(str(request.getfixturevalue(fixture)), "t")
    for layers in ((), (0,), (0, 1)):
        assert frozen_prefix(build(base, replace(task, layers=layers), "t")) is None
    prefix = frozen_prefix(build(base, task, "t"))
    assert isinstance(prefix, Prefix)
    assert prefix.depth == 1


def test_a_trained_parameter_outside_the_layers_keeps_the_prefix_off(tiny_bert: Path) -> None:
    model = build(find_base(str(tiny_bert), "t"), TOP["bert"][1], "t")
    model.get_submodule("encoder.base_model.model.embeddings").requires_grad_(True)
    assert frozen_prefix(model) is None


def test_entering_and_resuming_leave_the_model_as_it_was(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    names = [n for n, _ in trainer.model.named_modules()]
    ids, mask, _ = data.batch(ROWS)
    prefix = _kept(trainer).prefix
    with torch.no_grad():
        expected = trainer.model(ids, mask)
        states = prefix.enter(ids, mask)
        with prefix.given(states):
            assert torch.equal(trainer.model(ids, mask), expected)
        with pytest.raises(RuntimeError), prefix.given(states[:, :1]):  # other padding than the ids: not silently taken
            trainer.model(ids, mask)
        assert torch.equal(trainer.model(ids, mask), expected)
    assert [n for n, _ in trainer.model.named_modules()] == names


def test_roberta_too(tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        pad_token_id=0,
    )
    RobertaModel(config).save_pretrained(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_bert / name).read_bytes())
    trainer, data = make_trainer(tmp_path, replace(BERT_TASK, layers=(2,)))
    assert _kept(trainer).prefix.depth == 2
    expected = _without(trainer, data, ROWS)
    assert apart(summed(trainer, SPEC, data, ROWS), expected) < 1e-5

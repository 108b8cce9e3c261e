"""Per-sample gradients of LoRA and head over kept states: the product's model and loss, without the layers that are frozen.

Every trained matrix is spread to one copy per record (no memory: an expanded view) and applied with ``bmm``, so that autograd's
own gradient of the copies is the per-sample gradient. ``tests/bench/test_engine.py`` holds it against the product's ``Trainer``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cloister_model.build import build, read_vector, schema_of
from cloister_model.features import hashed_words, mean, raw, scaled
from cloister_model.scores import centred, seen
from cloister_model.text import Source
from cloister_model.warm_start import warm_head
from cloister_server.own_text import read_own
from cloister_shared.specs import TaskSpec, centre_and_spread
from cloister_shared.vectors import F32, Schema
from torch import Tensor
from torch.nn import functional

from bench.kept import I64, Kept, chunks

_LORA = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.lora_([AB])\.")
_INSIDE = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
RECORDS = 64  # a physical batch
OWN = 1000  # of the test records, unlabelled: the coordinator's own text that the centre is made of, as in the product


@dataclass(frozen=True)
class Shape:
    """What is trained, and what the head sees.

    Attributes:
        layers: Layers with LoRA; empty for a head on frozen features.
        targets: As a task's ``target_modules``.
        rank: LoRA's rank.
        alpha: LoRA's scale numerator.
        freeze_a: Whether A is public and not trained.
        words: Width of the block of hashed words; 0 for none.
        centre: Whether what the coordinator's own text has in the mean is taken off.
        public: Labelled JSONL that everybody may see, which the head starts from; empty for none.
    """

    layers: tuple[int, ...] = ()
    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    freeze_a: bool = False
    words: int = 4096
    centre: bool = True
    public: str = ""


class Engine:
    """The model of one ``Shape`` over kept states.

    Args:
        kept: Records and states.
        shape: What is trained.
        dtype: What the layers above compute in; the head and all sums are float32.

    Attributes:
        schema: Names and shapes of the trained parameters, as the product's.
        heads: How many of the parameters are the head's: the last ones.
        start: The parameters that a run starts from.
        task: As the product would state it, with its centre.
    """

    def __init__(self, kept: Kept, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        self.kept, self.shape, self.dtype = kept, shape, dtype
        self.depth, width = kept.depth, kept.means.shape[2]
        self.classes = torch.from_numpy(kept.classes)
        self.features = shape.words + 2 * width
        self.heads = len(kept.labels) * (self.features + 1)
        heads = (("head.weight", (len(kept.labels), self.features)), ("head.bias", (len(kept.labels),)))
        self.task = TaskSpec(
            kind="text-classification",
            labels=kept.labels,
            max_tokens=128,
            target_modules=shape.targets,
            layers=shape.layers,
            rank=shape.rank,
            alpha=shape.alpha,
            freeze_a=shape.freeze_a,
            words=shape.words,
        )
        self._fixed: dict[tuple[int, str, str], Tensor] = {}
        self._inside: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        adapters: tuple[tuple[str, tuple[int, ...]], ...] = ()
        start = np.zeros(0, dtype=np.float32)
        if shape.layers:
            adapters, start = self._model(kept, shape)
        self.schema = Schema(adapters + heads)
        self.start: F32 = np.concatenate([start, np.zeros(sum(int(np.prod(s)) for _, s in heads), dtype=np.float32)])
        self._means = torch.from_numpy(kept.means)
        if shape.centre:
            own = np.arange(kept.train, min(kept.train + OWN, len(kept.encoded)))
            self.task = centred(self.task, raw(self._words(own), *self._means[:, own]).double().numpy())
        scale = centre_and_spread(self.task, self.features, "bench")
        self._centre, self._divisor = (torch.from_numpy(values) for values in scale)
        if shape.public:
            weight = self._public_head(Path(shape.public))
            self.start[-self.heads : -len(kept.labels)] = weight.reshape(-1)
        self._ready: tuple[Tensor, Tensor] | None = None
        self._states = kept.states(min(shape.layers)) if shape.layers else None
        self._mixed = (
            self._keep_mixed() if shape.layers and not set(shape.targets) & {"query", "key", "value"} else None
        )

    def _public_head(self, path: Path) -> F32:
        """As the product's ``own_text.begin``."""
        data = read_own(Source(path, "text", "label"), self.task, self.kept.base)
        return warm_head(seen(build(self.kept.base, self.task, "bench"), data), data.labels, len(self.kept.labels))

    def _model(self, kept: Kept, shape: Shape) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], F32]:
        torch.manual_seed(0)
        model = build(kept.base, replace(self.task, words=0), "bench")
        inner = model.encoder.get_base_model()
        for layer in range(min(shape.layers), self.depth):
            for name in (*_INSIDE, *_NORMS):
                module = inner.encoder.layer[layer].get_submodule(name)
                module = getattr(module, "base_layer", module)
                self._inside[layer, name] = (module.weight.detach().to(self.dtype), module.bias.detach().to(self.dtype))
        for name, value in model.encoder.named_parameters():
            found = _LORA.search(name)
            if found and not value.requires_grad:
                self._fixed[int(found[1]), found[2], found[3]] = value.detach().to(self.dtype)
        tensors = tuple((n, s) for n, s in schema_of(model).tensors if not n.startswith("head."))
        return tensors, read_vector(model)[: sum(int(np.prod(s)) for _, s in tensors)]

    def _spread(
        self, vector: Tensor, count: int, grad: bool
    ) -> tuple[dict[tuple[int, str, str], Tensor], list[Tensor]]:
        at, found, leaves = 0, dict[tuple[int, str, str], Tensor](), list[Tensor]()
        for name, size in self.schema.tensors:
            lora = _LORA.search(name)
            length = int(np.prod(size))
            leaf = vector[at : at + length].view(size).to(self.dtype if lora else torch.float32).expand(count, *size)
            at += length
            leaf = leaf.detach().requires_grad_(grad)
            leaves.append(leaf)
            if lora:
                found[int(lora[1]), lora[2], lora[3]] = leaf
        for key, value in self._fixed.items():
            found[key] = value.expand(count, *value.shape)
        return found, leaves

    def _linear(self, x: Tensor, layer: int, name: str, lora: dict[tuple[int, str, str], Tensor]) -> Tensor:
        y = functional.linear(x, *self._inside[layer, name])
        if (layer, name, "B") not in lora:
            return y
        inner = torch.bmm(x, lora[layer, name, "A"].transpose(1, 2))
        return y + torch.bmm(inner, lora[layer, name, "B"].transpose(1, 2)) * (self.shape.alpha / self.shape.rank)

    def _padded(self, kept: Tensor, rows: I64) -> Tensor:
        lengths = self.kept.lengths[rows]
        out = torch.zeros(len(rows), int(lengths.max()), kept.shape[1], dtype=self.dtype)
        for i, row in enumerate(rows):
            begin = int(self.kept.starts[row])
            out[i, : lengths[i]] = kept[begin : begin + int(lengths[i])]
        return out

    def _mask(self, rows: I64) -> Tensor:
        lengths = torch.from_numpy(self.kept.lengths[rows])
        return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]

    def _attend(self, h: Tensor, mask: Tensor, layer: int, lora: dict[tuple[int, str, str], Tensor]) -> Tensor:
        count, longest, width = h.shape
        q, k, v = (
            self._linear(h, layer, name, lora).view(count, longest, width // 32, 32).transpose(1, 2)
            for name in _INSIDE[:3]
        )
        seen = None if bool(mask.all()) else mask[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return mixed.transpose(1, 2).reshape(count, longest, width)

    @torch.no_grad()
    def _keep_mixed(self) -> Tensor:
        """What attention of the lowest trained layer gives, where nothing trained lies below it: kept on disk too."""
        assert self._states is not None
        layer = min(self.shape.layers)
        path = self.kept.folder / f"mixed-{layer}.{str(self.dtype).removeprefix('torch.')}"
        if not path.exists():
            part = path.with_suffix(".part")
            out = np.memmap(part, np.float16 if not self.kept.exact else np.float32, "w+", shape=self._states.shape)
            for rows in chunks(np.arange(len(self.kept.encoded)), self.kept.lengths, RECORDS):
                mixed = self._attend(self._padded(self._states, rows), self._mask(rows), layer, {}).float().numpy()
                for i, row in enumerate(rows):
                    begin, count = int(self.kept.starts[row]), int(self.kept.lengths[row])
                    out[begin : begin + count] = mixed[i, :count]
            out.flush()
            part.rename(path)
        raw = np.memmap(path, np.float16 if not self.kept.exact else np.float32, "c", shape=tuple(self._states.shape))
        return torch.from_numpy(raw)

    def _last(self, rows: I64, lora: dict[tuple[int, str, str], Tensor]) -> Tensor:
        """Mean of the last layer's states, ``(n, hidden) float32``."""
        assert self._states is not None
        h, mask = self._padded(self._states, rows), self._mask(rows)
        width, lowest = h.shape[2], min(self.shape.layers)
        for layer in range(lowest, self.depth):
            given = self._mixed is not None and layer == lowest
            mixed = (
                self._padded(self._mixed, rows)
                if given and self._mixed is not None
                else self._attend(h, mask, layer, lora)
            )
            mixed = self._linear(mixed, layer, _INSIDE[3], lora)
            h = functional.layer_norm(h + mixed, (width,), *self._inside[layer, _NORMS[0]], eps=1e-12)
            wide = functional.gelu(self._linear(h, layer, _INSIDE[4], lora))
            h = functional.layer_norm(
                h + self._linear(wide, layer, _INSIDE[5], lora), (width,), *self._inside[layer, _NORMS[1]], eps=1e-12
            )
        return mean(h.float(), mask)

    def _words(self, rows: I64) -> Tensor | None:
        ids, mask, _ = self.kept.encoded.batch(rows)
        return hashed_words(ids, mask, self.shape.words) if self.shape.words else None

    def seen(self, rows: I64, lora: dict[tuple[int, str, str], Tensor]) -> Tensor:
        """What the head sees, ``(n, features) float32``."""
        last = self._last(rows, lora) if self.shape.layers else self._means[1, rows]
        return scaled(raw(self._words(rows), self._means[0, rows], last), self._centre, self._divisor)

    @torch.no_grad()
    def _frozen(self) -> tuple[Tensor, Tensor]:
        """What a head alone sees of every record, and its squared length with the bias' one; made once."""
        if self._ready is None:
            count = len(self.kept.encoded)
            every = torch.cat([self.seen(np.arange(at, min(at + 500, count)), {}) for at in range(0, count, 500)])
            self._ready = every, (every**2).sum(1) + 1
        return self._ready

    def gradients(self, rows: I64, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample gradients ``(n, d) float32`` and losses ``(n,)``."""
        lora, leaves = self._spread(vector, len(rows), grad=True)
        x = self.seen(rows, lora)
        logits = torch.bmm(leaves[-2], x.unsqueeze(-1)).squeeze(-1) + leaves[-1]
        losses = functional.cross_entropy(logits, self.classes[rows], reduction="none")
        found = torch.autograd.grad(losses.sum(), leaves)
        return torch.cat([g.reshape(len(rows), -1).float() for g in found], 1), losses.detach()

    def _head_sum(self, rows: I64, vector: Tensor, clip: float | None) -> Tensor:
        # A head alone: one record's gradient is an outer product, whose norm needs no gradient.
        every, squares = self._frozen()
        x, weight, bias = every[rows], *self._head(vector)
        error = torch.softmax(x @ weight.T + bias, 1) - functional.one_hot(self.classes[rows], len(bias)).float()
        if clip is not None:
            norms = error.norm(dim=1) * squares[rows].sqrt()
            error = error * (clip / norms.clamp(min=1e-12)).clamp(max=1)[:, None]
        return torch.cat([(error.T @ x).reshape(-1), error.sum(0)])

    def _head(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.kept.labels)
        return vector[-count * (self.features + 1) : -count].view(count, self.features), vector[-count:]

    def clipped_sum(self, rows: I64, vector: Tensor, clip: float | None) -> Tensor:
        """Sum of the rows' gradients, each clipped to ``clip`` (None: not), ``(d,) float32``."""
        if not len(rows):
            return torch.zeros(len(self.start))
        if not self.shape.layers:
            return self._head_sum(rows, vector, clip)
        total = torch.zeros(len(self.start))
        for part in chunks(rows, self.kept.lengths, RECORDS):
            found, _ = self.gradients(part, vector)
            share = torch.ones(len(part)) if clip is None else (clip / found.norm(dim=1).clamp(min=1e-12)).clamp(max=1)
            total += share @ found
        return total

    @torch.no_grad()
    def accuracy(self, rows: I64, vector: Tensor) -> float:
        """Share of right classes."""
        right, (weight, bias) = 0, self._head(vector)
        if not self.shape.layers:
            guess = (self._frozen()[0][rows] @ weight.T + bias).argmax(1)
            return int((guess == self.classes[rows]).sum()) / len(rows)
        for part in chunks(rows, self.kept.lengths, 2 * RECORDS):
            lora, _ = self._spread(vector, len(part), grad=False)
            right += int(((self.seen(part, lora) @ weight.T + bias).argmax(1) == self.classes[part]).sum())
        return right / len(rows)

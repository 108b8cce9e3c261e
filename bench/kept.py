"""States of the frozen layers for all records of a task, computed once and kept on disk, so that many runs can share them.

The product keeps the same states inside one agent (``cloister_client.activations``); here one file serves every simulated site:

    FOLDER/KEY/states-L.f16  what enters layer L of every record, ``(tokens, hidden) float16``, no padding
    FOLDER/KEY/means.npy     what the product's ``Adapted.means`` gives for the base as it is, ``(2, n, hidden)``

The key is a digest of the base, the texts and ``max_tokens``. The lower layers run under bf16 autocast.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cloister_model.base import BaseModel
from cloister_model.features import mean, weights
from cloister_model.tokens import Encoded, encode
from cloister_shared.encoding import canonical, digest
from cloister_shared.vectors import F32
from torch import Tensor
from transformers import AutoConfig, AutoModel

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Kept:
    """Records of a task with the frozen layers' states.

    Attributes:
        base: The base model.
        labels: Class names, sorted.
        encoded: Tokens and labels, training records first.
        train: How many are for training; the rest is the test split.
        lengths: Tokens of each record, ``(n,)``.
        starts: Where each record's rows begin in the states, ``(n,)``.
        means: Means of the static embeddings and of the last states, ``(2, n, hidden)``.
        depth: Layers.
        folder: Where the states lie.
        exact: Whether they are float32, computed in float32.
    """

    base: BaseModel
    labels: tuple[str, ...]
    encoded: Encoded
    train: int
    lengths: I64
    starts: I64
    means: F32
    depth: int
    folder: Path
    exact: bool

    @property
    def classes(self) -> I64:
        """The class of every record, ``(n,)``."""
        return np.asarray(self.encoded.labels, dtype=np.int64)

    def states(self, layer: int) -> Tensor:
        """What enters ``layer``, ``(tokens, hidden)``, mapped from disk."""
        raw = np.memmap(_path(self.folder, layer, self.exact), dtype=_type(self.exact), mode="c")
        return torch.from_numpy(raw).view(-1, self.means.shape[2])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def keep(
    base: BaseModel,
    train: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
    tokens: int,
    cache: Path,
    exact: bool = False,
) -> Kept:
    """Computes the states, or takes those that are there.

    Args:
        base: The base model.
        train: Rows with ``text`` and ``label``.
        test: The same.
        tokens: ``max_tokens``.
        cache: Folder of the kept states.
        exact: Float32 throughout, for comparisons; else bf16 autocast and float16 on disk.
    """
    rows = [*train, *test]
    labels = tuple(sorted({row["label"] for row in rows}))
    encoded = encode(base, [r["text"] for r in rows], [labels.index(r["label"]) for r in rows], tokens)
    lengths = np.array([len(ids) for ids in encoded.ids], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    key = digest(canonical(["bench-kept/2", base.digest, tokens, [list(ids) for ids in encoded.ids]]))[:16]
    folder = cache / (key + "-exact" * exact)
    if not (folder / "means.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compute(base, encoded, lengths, starts, folder, exact)
    means = np.load(folder / "means.npy")
    depth = int(AutoConfig.from_pretrained(str(base.path), local_files_only=True).num_hidden_layers)
    return Kept(base, labels, encoded, len(train), lengths, starts, means, depth, folder, exact)


def chunks(rows: I64, lengths: I64, size: int) -> Iterator[I64]:
    """``rows`` by length, longest first, ``size`` at a time."""
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    for at in range(0, len(order), size):
        yield order[at : at + size]


def _path(folder: Path, layer: int, exact: bool) -> Path:
    return folder / f"states-{layer}.{'f32' if exact else 'f16'}"


def _type(exact: bool) -> type[np.floating[Any]]:
    return np.float32 if exact else np.float16


@torch.no_grad()
def _compute(base: BaseModel, encoded: Encoded, lengths: I64, starts: I64, folder: Path, exact: bool) -> None:
    model = AutoModel.from_pretrained(str(base.path), local_files_only=True, use_safetensors=True).eval()
    depth, width = int(model.config.num_hidden_layers), int(model.config.hidden_size)
    means = np.zeros((2, len(encoded), width), dtype=np.float32)
    files = [
        np.memmap(_path(folder, layer, exact), _type(exact), "w+", shape=(int(lengths.sum()), width))
        for layer in range(depth)
    ]
    for rows in chunks(np.arange(len(encoded)), lengths, 64):
        ids, mask, _ = encoded.batch(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        means[0, rows] = mean(model.get_input_embeddings()(ids), weights(ids, mask)).numpy()
        means[1, rows] = mean(states[-1].float(), mask).numpy()
        for layer, state in enumerate(states[:-1]):
            for i, row in enumerate(rows):
                files[layer][starts[row] : starts[row] + lengths[row]] = state[i, : lengths[row]].float().numpy()
    for file in files:
        file.flush()
    np.save(folder / "means.npy", means)

"""Scores of a model on text that may be scored: the coordinator's held-out text, or a site's own, at home.

The numbers are exact functions of the text they were computed on: whoever calls this on private text must not let them
out un-noised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from cloister_shared.specs import LEAST_SPREAD, MAX_SPREAD, TaskSpec
from torch import Tensor

from cloister_model.build import Adapted, losses
from cloister_model.features import BLOCK_WEIGHTS
from cloister_model.tokens import Encoded

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Scores on one set of records.

    Attributes:
        loss: Mean loss in nats.
        accuracy: Share of right classes; None for a language model.
        macro_f1: Unweighted mean of the classes' F1, over classes that are present or predicted; None for a language model.
        perplexity: exp(loss); None for classification.
        recalls: Share of right answers by label, of labels that there are; empty for a language model.
    """

    loss: float
    accuracy: float | None
    macro_f1: float | None
    perplexity: float | None
    recalls: dict[str, float] = field(default_factory=dict)


def macro_f1(truth: np.ndarray, guess: np.ndarray, classes: int) -> float:
    """Unweighted mean of F1 over the classes that occur in ``truth`` or ``guess`` (both ``(n,) int``)."""
    each = []
    for label in range(classes):
        hit = int(((guess == label) & (truth == label)).sum())
        total = int((guess == label).sum() + (truth == label).sum())
        if total:
            each.append(2 * hit / total)
    return float(np.mean(each)) if each else 0.0


@torch.no_grad()
def predict(model: Adapted, data: Encoded, *, batch: int = 64, device: str = "cpu") -> np.ndarray:
    """Logits ``(n, labels) float32`` of a classifier, in the records' order."""
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))
    out: dict[int, np.ndarray] = {}
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        ids, mask, _ = data.batch(rows, device)
        for i, row in enumerate(model(ids, mask).float().cpu().numpy()):
            out[rows[i]] = row
    return np.stack([out[i] for i in range(len(data))])


@torch.no_grad()
def score(model: Adapted, task: TaskSpec, data: Encoded, *, batch: int = 64, device: str = "cpu") -> Scores:
    """Scores ``model`` on ``data``, which must not be empty."""
    if task.kind == "causal-lm":
        model.eval()
        order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))
        each = [losses(model, task, *data.batch(order[at : at + batch], device)) for at in range(0, len(order), batch)]
        loss = float(torch.cat(each).double().mean())
        return Scores(loss, None, None, float(np.exp(loss)))
    return of_logits(predict(model, data, batch=batch, device=device), data.labels, task.labels)


def of_logits(logits: np.ndarray, classes: Sequence[int], labels: Sequence[str]) -> Scores:
    """A classifier's scores from its logits, ``(n, labels)``, and the records' classes, ``(n,)``; n >= 1."""
    wide, truth = logits.astype(np.float64), np.asarray(classes)
    peak = wide.max(1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(wide - peak).sum(1))
    loss = float((log_sum - wide[np.arange(len(truth)), truth]).mean())
    guess = wide.argmax(1)
    there = [(i, label) for i, label in enumerate(labels) if (truth == i).any()]
    recalls = {label: float((guess[truth == i] == i).mean()) for i, label in there}
    return Scores(loss, float((guess == truth).mean()), macro_f1(truth, guess, len(labels)), None, recalls)


@torch.no_grad()
def with_centre(model: Adapted, task: TaskSpec, data: Encoded, *, most: int = 1000) -> TaskSpec:
    """``task`` with a centre and spreads made of the first ``most`` of somebody's own records, before any training.

    A function of ``data``, which it gives away in part: for the coordinator's own text, never for a site's.
    """
    return centred(task, _over(model, data, most, model.features))


@torch.no_grad()
def seen(model: Adapted, data: Encoded) -> F64:
    """What the head sees of each record, ``(n, words + 2 hidden)``."""
    return _over(model, data, len(data), model.seen)


def _over(model: Adapted, data: Encoded, most: int, what: Callable[[Tensor, Tensor], Tensor]) -> F64:
    model.eval()
    parts = []
    for at in range(0, min(len(data), most), 64):
        ids, mask, _ = data.batch(range(at, min(at + 64, len(data), most)), str(model.centre.device))
        parts.append(what(ids, mask).double().cpu())
    return torch.cat(parts).numpy()


def centred(task: TaskSpec, features: F64) -> TaskSpec:
    """``task`` with the centre and spreads of ``(n, words + 2 hidden)`` features from ``features.raw``."""
    centre = features.mean(axis=0).astype("<f2")
    off, width = features - centre.astype(np.float64), (features.shape[1] - task.words) // 2
    blocks = np.split(off, [task.words, task.words + width], axis=1)
    spread = [
        float(np.sqrt((block**2).sum(axis=1).mean())) / weight
        for block, weight in zip(blocks, BLOCK_WEIGHTS, strict=True)
        if block.shape[1]
    ]
    return replace(
        task, centre=centre.tobytes().hex(), spread=tuple(min(max(s, LEAST_SPREAD), MAX_SPREAD) for s in spread)
    )

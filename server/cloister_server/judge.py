"""Judging a candidate on the coordinator's own held-out text. The one place of the coordinator that needs torch to decide anything.

The text is the coordinator's to score, so its numbers may be printed; no site's text comes here.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

from cloister_model.build import Adapted, load_vector
from cloister_model.scores import score
from cloister_model.tokens import Encoded
from cloister_shared.specs import TaskSpec
from cloister_shared.vectors import F32

# Before a label, the name of its score.
RECALL = "recall:"


class Judge(Protocol):
    """Something that scores an adapter."""

    def judge(self, vector: F32) -> tuple[dict[str, float], float]:
        """Scores by name, and the seconds it took."""


class NoJudge:
    """For a coordinator without held-out text."""

    def judge(self, vector: F32) -> tuple[dict[str, float], float]:
        """No scores."""
        return {}, 0.0


class HeldOutJudge:
    """Scores adapters on held-out text with one warm model.

    Args:
        model: From ``cloister_model.build``.
        task: What is learnt.
        data: Tokenised held-out text, not empty.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, model: Adapted, task: TaskSpec, data: Encoded, device: str = "cpu") -> None:
        self._model, self._task, self._data, self._device = model.to(device), task, data, device

    def judge(self, vector: F32) -> tuple[dict[str, float], float]:
        """Accuracy, macro-F1, loss and each label's recall, or loss and perplexity; a score that is not finite is left out."""
        started = time.monotonic()
        load_vector(self._model, vector)
        got = score(self._model, self._task, self._data, device=self._device)
        named = {"loss": got.loss, "accuracy": got.accuracy, "macro_f1": got.macro_f1, "perplexity": got.perplexity}
        named |= {f"{RECALL}{label}": share for label, share in got.recalls.items()}
        return {k: v for k, v in named.items() if v is not None and math.isfinite(v)}, time.monotonic() - started

"""A first head out of public labelled text: ridge regression onto the classes, in the dual, at a fixed length.

It costs no budget, because no site's text is asked for it, and so it must never be given any. What it saves is the noise of the steps
that would have found the same (public text before private training: Tramèr and Boneh, ICLR 2021). A few sentences for each label
are enough to be of use. The bias stays zero: how frequent a class is at the sites, public text does not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cloister_shared.vectors import F32

from cloister_model.features import LENGTH

# Logits of a record that lies where a class' row points; picked, as RIDGE, on text apart from the tables' (bench/results).
LOGIT = 12.0
RIDGE = 1.0


def warm_head(features: npt.NDArray[np.float64], classes: Sequence[int], labels: int) -> F32:
    """The head's first weight.

    Args:
        features: ``(n, d)``, what the head sees, rows of at most ``LENGTH``; n >= 1.
        classes: ``(n,)``, below ``labels``.
        labels: How many classes there are.

    Returns:
        ``(labels, d) float32``; rows of length ``LOGIT / LENGTH`` in the mean. The row of a class that has no record is zero.
    """
    truth = np.asarray(classes)
    wanted = (truth[:, None] == np.arange(labels)) - 1 / labels
    gram = features @ features.T / LENGTH**2
    shares = np.linalg.solve(gram + RIDGE * np.eye(len(truth)), wanted)
    weight: npt.NDArray[np.float64] = shares.T @ features
    there = np.isin(np.arange(labels), truth)
    weight[~there] = 0
    size = float(np.linalg.norm(weight[there], axis=1).mean())
    return (weight * (LOGIT / LENGTH / max(size, 1e-12))).astype(np.float32)

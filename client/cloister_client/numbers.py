"""Numbers about a site's text that leave with noise: sums over its privacy units, each a Gaussian release (Dwork and Roth 2014, A.1).

A unit moves a sum by at most the number's bound, whatever its records say; every unit takes part, so that nothing is gained by
sampling. The reservation holds their cost before they are made (``PlanCore.events``). They are made once for a plan and kept with
its update: a retry sends the same numbers, since other noise on them would be another release. Charges nothing itself.
"""

from __future__ import annotations

import itertools
import math

import torch
from cloister_model.build import load_vector
from cloister_model.tokens import Encoded, padded
from cloister_shared import noise
from cloister_shared.plan import PlanCore
from cloister_shared.specs import NoisedNumber
from cloister_shared.vectors import F32

from cloister_client.batches import physical_batches
from cloister_client.release import AccountedCount, NoisedMetric
from cloister_client.train import PHYSICAL_TOKENS, Trainer


def noised_numbers(
    trainer: Trainer, core: PlanCore, parent: F32, data: Encoded
) -> tuple[NoisedMetric | AccountedCount, ...]:
    """The numbers that ``core`` asks for, in its order.

    Args:
        trainer: After the round's training: ``loss`` is that of the adapter as it is now, which is private already.
        core: The work; its numbers were reserved.
        parent: The adapter that the round began with, ``(d,) float32``; the model has it afterwards where its loss was asked for.
        data: The units that it was trained on.
    """
    made: list[NoisedMetric | AccountedCount] = []
    # The parent's loss last: the model is given it for that.
    for asked in sorted(core.noised, key=lambda number: number.name == "parent_loss"):
        if asked.name == "units":
            made.append(AccountedCount(_noised(float(len(data.units)), asked)))
        else:
            if asked.name == "parent_loss":
                load_vector(trainer.model, parent)
            each = unit_losses(trainer, data, core.training.unit_records)
            made.append(NoisedMetric(asked.name, _noised(math.fsum(cut(v, asked.bound) for v in each), asked)))
    return tuple(made)


def cut(value: float, bound: float) -> float:
    """``value`` within ``[0, bound]``; what is not a number counts as 0."""
    return min(max(value, 0.0), bound) if not math.isnan(value) else 0.0


def _noised(total: float, asked: NoisedNumber) -> float:
    return total + float(noise.gaussian(1, asked.noise_multiplier * asked.bound)[0])


@torch.no_grad()
def unit_losses(trainer: Trainer, data: Encoded, most: int) -> list[float]:
    """Mean loss of each unit's first ``most`` records (private)."""
    rows = sorted((row for unit in data.units for row in unit[:most]), key=lambda row: len(data.ids[row]))
    found: dict[int, float] = {}
    trainer.hooked.eval()
    # Of one padded length, and no more tokens than in training: what one record needs and gives is not the others' affair.
    for _, alike in itertools.groupby(rows, key=lambda row: padded(len(data.ids[row]))):
        alone = [(row,) for row in alike]
        for part in physical_batches(alone, data, PHYSICAL_TOKENS[trainer.device.name], trainer.together):
            found |= dict(zip(part.rows, trainer.losses(data, part.rows).double().tolist(), strict=True))
    return [math.fsum(found[row] for row in unit[:most]) / len(unit[:most]) for unit in data.units]

"""Refuses, before any budget is reserved, models and losses whose training would not be differentially private.

First what can be read off the modules: BatchNorm, DoRA, non-reentrant checkpointing, a trained parameter outside ``Linear``. Then what only
shows when it runs: two passes over two made-up records, through the very step that training takes. It proves nothing about
code that behaves otherwise on other records; the oracle in the tests covers the architectures that we build.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cloister_model.build import Adapted, trained
from cloister_model.tokens import Encoded
from cloister_shared.errors import RefusedError
from cloister_shared.specs import TaskSpec
from torch import Tensor, nn

EachLoss = Callable[[Encoded, tuple[int, ...]], Tensor]


def refuse_unclippable(model: nn.Module) -> None:
    """Refuses what the modules themselves show.

    Raises:
        RefusedError: BatchNorm, DoRA, non-reentrant checkpointing, or a trained parameter outside ``Linear`` layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise RefusedError("train.batch_norm", "BatchNorm mixes records", where=name)
        if getattr(module, "use_dora", None) and any(module.use_dora.values()):
            raise RefusedError("train.dora", "DoRA's gradients cannot be clipped per record", where=name)
        # The function is a partial of torch's checkpoint; without the word, torch's own default is non-reentrant.
        how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and how.get("use_reentrant") is not True:
            raise RefusedError(
                "train.checkpointing",
                "non-reentrant checkpointing runs the layers twice, and per-record gradients come out wrong",
                where=name,
                expected="no checkpointing, or use_reentrant=True",
            )
        if not isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise RefusedError(
                "train.unclipped",
                "a trained parameter would not be clipped",
                where=name,
                expected="Linear layers",
                got=type(module).__name__,
            )


def probe(model: Adapted, task: TaskSpec, each_loss: EachLoss, tolerance: float) -> None:
    """Runs two passes on a record as long as the task allows beside a short one, then beside another.

    Args:
        model: With hooks; its trained parameters are left as they were.
        task: What is learnt.
        each_loss: One loss per record of the given rows, ready for ``backward``.
        tolerance: Relative distance that rounding may make.

    Raises:
        RefusedError: The model cannot be run at that length; a trained parameter has no gradient per record (OPT flattens
            tokens into the first dimension: each token would be clipped as if it were a record), or one that does not
            add up to the batch's (a part of it would escape the clip); or a record's loss or gradient depends on its company.
    """
    long = (3,) * task.max_tokens
    last = max(len(task.labels) - 1, 0)
    pairs = [Encoded((long, (3,)), (0, 0), 0), Encoded((long, (4,) * (task.max_tokens // 2)), (0, last), 0)]
    named = trained(model)
    before = [p.detach().clone() for p in named.values()]
    try:
        with torch.no_grad():
            # Nowhere zero: behind a head of zeros every gradient of the adapter would be zero, and agree.
            for at, p in enumerate(named.values()):
                p.copy_(0.05 * torch.cos(1.7 * torch.arange(p.numel(), device=p.device) + at).view(p.shape))
        runs = [_run(named, each_loss, pair, tolerance) for pair in pairs]
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(
            "train.unsupported", "the model does not run as the task asks", got=str(error)[:200]
        ) from error
    finally:
        with torch.no_grad():
            for p, value in zip(named.values(), before, strict=True):
                p.copy_(value)
                p.grad = None
                setattr(p, "grad_sample", None)  # noqa: B010  # Opacus' own attribute
    (losses, gradients), (other_losses, other_gradients) = runs
    size = max(float(rows[0].norm()) for rows in gradients.values())
    moved = max(float((other_gradients[n][0] - rows[0]).norm()) for n, rows in gradients.items())
    if moved > tolerance * size or abs(float(losses[0] - other_losses[0])) > tolerance * abs(float(losses[0])):
        raise RefusedError(
            "train.coupled",
            "a record's loss or gradient depends on the records beside it",
            expected="a loss per record",
            got=f"moved by {moved:.2g} of {size:.2g}",
        )


def _run(
    named: dict[str, nn.Parameter], each_loss: EachLoss, data: Encoded, tolerance: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses ``(2,)`` and gradients ``(2, *shape)`` by name of two records.

    Raises:
        RefusedError: Some gradient is not per record, or not all of it.
    """
    for p in named.values():
        p.grad = None
        setattr(p, "grad_sample", None)  # noqa: B010
    each = each_loss(data, (0, 1))
    if each.shape != (2,):
        raise RefusedError(
            "train.coupled", "the loss is not one per record", expected="(2,)", got=str(tuple(each.shape))
        )
    torch.autograd.backward(each.sum())
    out: dict[str, Tensor] = {}
    for name, p in named.items():
        rows = getattr(p, "grad_sample", None)
        if not isinstance(rows, Tensor) or len(rows) != 2:
            raise RefusedError(
                "train.unclipped",
                "a trained parameter has no gradient per record",
                where=name,
                expected="2 rows for 2 records",
                got="none" if not isinstance(rows, Tensor) else f"{len(rows)} rows",
            )
        out[name] = rows
    size = max(float(rows.norm()) for rows in out.values())
    for name, p in named.items():
        if p.grad is None or float((out[name].sum(0) - p.grad).norm()) > tolerance * size:
            raise RefusedError(
                "train.unclipped",
                "a trained parameter has a gradient beside the one per record",
                where=name,
                expected="gradients per record that add up to the batch's",
            )
    return each.detach(), out

"""The coordinator's own text: what candidates are judged on, and what a run starts from before any site's text is asked for anything.

    held out   scored after each round; the head's centre is made of it
    public     labelled text that everybody may see: the head starts from it, at no cost of budget

What is made of either goes to every site without noise. Neither is a site's text, and no site's text comes here.
"""

from __future__ import annotations

import torch
from cloister_model.base import BaseModel
from cloister_model.build import Adapted, set_centre
from cloister_model.public_text import SENTENCES
from cloister_model.scores import seen, with_centre
from cloister_model.text import Source, read
from cloister_model.tokens import Encoded, encode
from cloister_model.warm_start import warm_head
from cloister_shared.errors import InputError
from cloister_shared.specs import TaskSpec


def read_own(own: Source, task: TaskSpec, base: BaseModel) -> Encoded:
    """The text, tokenised.

    Raises:
        InputError: The text is not as it must be.
    """
    records = tuple(read(own, task.labels or None))
    classes = [task.labels.index(r.label) if task.labels else 0 for r in records]
    return encode(base, [r.text for r in records], classes, task.max_tokens)


def check_apart(held_out: Encoded | None, public: Encoded | None, where: str) -> None:
    """Sees that no held-out record is public text too: scores on it would flatter.

    Raises:
        InputError: One is in both, as far as ``max_tokens`` reaches.
    """
    both = set(held_out.ids) & set(public.ids) if held_out is not None and public is not None else set()
    if both:
        raise InputError(
            "public text is held out too",
            where=where,
            expected="no record in both",
            got=f"{len(both)} records in both",
            mend="take them out of one of the files",
        )


def begin(
    model: Adapted, task: TaskSpec, base: BaseModel, held_out: Encoded | None, public: Encoded | None
) -> TaskSpec:
    """Makes what a new run starts from, in place: the head's centre, and a first head where there is public text.

    The centre is made of held-out text, else of public text, else of sentences that come with Cloister.

    Returns:
        The task with its centre; as it was where it has no head.
    """
    if model.head is None:
        return task
    own = held_out if held_out is not None else public
    if own is None:
        own = encode(base, SENTENCES, [0] * len(SENTENCES), task.max_tokens)
    task = with_centre(model, task, own)
    set_centre(model, task, "a new run")
    if public is not None:
        head = warm_head(seen(model, public), public.labels, len(task.labels))
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(head))
    return task

"""The frozen layers below the lowest trained one, run apart from the rest.

``enter`` computes the states that go into the lowest trained layer, or that leave the last where only a head is trained; inside
``given`` the model's own forward takes such states instead of computing them. Both swap the model's list of layers for one
of the same length with stand-ins and run the model's own code, so that masks, positions and attention stay its own.
Nothing is kept here: the client's ``activations`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cloister_model.build import Adapted

# Architectures whose layers are called one after another, hidden states first, and were tested so.
FAMILIES = ("bert", "roberta", "xlm-roberta", "gpt2")


class _Given(nn.Module):
    """Stands in for a frozen layer: gives states that were computed before."""

    states: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden if self.states is None else self.states


class _Caught(nn.Module):
    """Stands in for a layer above: keeps what came in and passes it on."""

    states: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.states = hidden
        return hidden


class _Last(nn.Module):
    """Stands in for the last layer where that is frozen too: runs it and keeps what comes out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.states: Tensor | None = None

    def forward(self, *given: Any, **named: Any) -> Tensor:
        out: Tensor = self.layer(*given, **named)
        self.states = out
        return out


class Prefix:
    """The first ``depth`` layers of a model.

    Args:
        inner: The transformer without PEFT's wrapper and without language-model head.
        owner: The module that holds the list of layers.
        name: The list's attribute.
        depth: How many layers are frozen; at least 1.
    """

    def __init__(self, inner: nn.Module, owner: nn.Module, name: str, depth: int) -> None:
        self.depth = depth
        self._inner, self._owner, self._name = inner, owner, name
        self._whole: nn.ModuleList = getattr(owner, name)
        above = len(self._whole) - depth
        self._given = _Given()
        self._caught: _Caught | _Last = _Caught() if above else _Last(self._whole[-1])
        # Of the same length as the model's own: some forwards look things up by a layer's position.
        self._upper = nn.ModuleList([self._given] * depth + list(self._whole[depth:]))
        self._lower = nn.ModuleList(list(self._whole[: depth if above else -1]) + [self._caught] * max(above, 1))

    @torch.no_grad()
    def enter(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The states that enter layer ``depth``, or leave the last: ``(n, tokens, hidden)``; in the model's or autocast's dtype."""
        setattr(self._owner, self._name, self._lower)
        try:
            self._inner(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            setattr(self._owner, self._name, self._whole)
            states, self._caught.states = self._caught.states, None
        assert states is not None
        return states

    @contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Inside, the model's forward starts at layer ``depth`` with ``states``, of the same records and padding."""
        self._given.states = states
        setattr(self._owner, self._name, self._upper)
        try:
            yield
        finally:
            setattr(self._owner, self._name, self._whole)
            self._given.states = None


def frozen_prefix(model: Adapted) -> Prefix | None:
    """The model's frozen layers.

    Returns:
        All layers where only the head is trained. None where layer 0 is trained, the architecture is not one of ``FAMILIES``, or
        layers are checkpointed (reentrant checkpointing takes its gradients by way of the embeddings' output).
    """
    outer = model.encoder.get_base_model()
    inner = outer.base_model
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in outer.modules())
    if outer.config.model_type not in FAMILIES or checkpointed:
        return None
    depth = int(outer.config.num_hidden_layers)
    owner, name = next(
        (owner, name)
        for owner in inner.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    )
    layers: nn.ModuleList = getattr(owner, name)
    held = [{id(p) for p in layer.parameters() if p.requires_grad} for layer in layers]
    # A trained parameter outside the layers might lie below them (embeddings): only the head is known to lie above.
    apart = {id(p) for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")}
    lowest = next((i for i, inside in enumerate(held) if inside), depth)
    if lowest == 0 or apart - set().union(*held):
        return None
    return Prefix(inner, owner, name, lowest)

"""The trained model: a frozen base, LoRA on some of its linear layers, and a head for classification.

``build`` makes it from the pinned folder; the vector order of its trained parameters is the order in which the modules
hold them, under the names that PEFT writes. All dropout is off: under DP it costs accuracy and buys nothing, and scores
must be the same at the sites, at the coordinator and after export. Refused here: an adapter on layers that Opacus cannot
clip (only ``Linear`` and GPT-2's ``Conv1D`` carry LoRA).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from cloister_shared.errors import InputError
from cloister_shared.frozen_a import frozen_a
from cloister_shared.specs import TaskSpec, centre_and_spread
from cloister_shared.vectors import F32, Schema
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cloister_model import attention
from cloister_model.base import BaseModel
from cloister_model.features import hashed_words, mean, raw, scaled, weights
from cloister_model.tokens import STEP, padded

# A multiple of twice the numbers in a CPU's widest vectors: such many are all computed alike, wherever one stands among them.
ROWS = 32


class Adapted(nn.Module):
    """Encoder or decoder with LoRA, and a head on ``features`` of a record where the task is classification.

    Attributes:
        encoder: The PEFT model; its base parameters are frozen.
        head: ``Linear(words + 2 hidden, labels)`` or None.
        words: Width of the hashed words; 0 for none.
        centre: ``(words + 2 hidden,)``, what is taken off the features; zeros where the task names none.
        spread: ``(words + 2 hidden,)``, what they are divided by; ones where the task names none.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, encoder: Any, head: nn.Linear | None, words: int, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.words = words
        self.register_buffer("centre", torch.zeros(words + 2 * hidden), persistent=False)
        self.register_buffer("spread", torch.ones(words + 2 * hidden), persistent=False)

    def means(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the static embeddings and of the last states, ``(n, hidden)`` each, float32 or wider."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        with torch.no_grad():
            embedded: Tensor = self.encoder.get_base_model().get_input_embeddings()(input_ids)
        wide = self.centre.dtype
        return mean(embedded.to(wide), weights(input_ids, attention_mask)), mean(hidden.to(wide), attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits: ``(n, labels)`` for classification, ``(n, tokens, vocabulary)`` for a causal language model."""
        if self.head is None:
            return cast(Tensor, self.encoder(input_ids=input_ids, attention_mask=attention_mask).logits)
        seen = self.seen(input_ids, attention_mask)
        # A head gets each record's row with rows of zeros below: a kernel's result may depend on a row's place among the last few.
        return cast(Tensor, self.head(nn.functional.pad(seen.unsqueeze(1), (0, 0, 0, STEP - 1)))[:, 0])

    def seen(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head sees: the blocks centred, scaled and of one length, ``(n, words + 2 hidden)``."""
        return scaled(self.features(input_ids, attention_mask), self.centre, self.spread)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The blocks as they are, ``(n, words + 2 hidden)``."""
        words = hashed_words(input_ids, attention_mask, self.words) if self.words else None
        return raw(words, *self.means(input_ids, attention_mask))


def _quiet_config(base: BaseModel) -> Any:
    config = AutoConfig.from_pretrained(str(base.path), local_files_only=True, trust_remote_code=False)
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "attention_dropout",
    ):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0.0)
    return config


def lora_config(task: TaskSpec) -> LoraConfig:
    """PEFT's configuration for ``task``; deterministic, no dropout, no DoRA."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM if task.kind == "causal-lm" else TaskType.FEATURE_EXTRACTION,
        r=task.rank,
        lora_alpha=task.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(task.target_modules),
        layers_to_transform=list(task.layers) or None,
        fan_in_fan_out=False,
    )


def build(base: BaseModel, task: TaskSpec, where: str) -> Adapted:
    """Builds the model on the CPU in float32, LoRA's B and the head at zero; A is random, or ``frozen_a``'s and not trained.

    Raises:
        InputError: The base has no such modules or layers, or the task's centre is of another size.
    """
    config = _quiet_config(base)
    if task.kind == "causal-lm" and not any(
        str(name).endswith(("LMHeadModel", "ForCausalLM")) for name in getattr(config, "architectures", None) or ()
    ):
        made = ", ".join(map(str, getattr(config, "architectures", None) or ["none"]))
        raise InputError(
            "the base is no causal language model", where=where, expected="…LMHeadModel or …ForCausalLM", got=made
        )
    attention.register()
    kind = AutoModelForCausalLM if task.kind == "causal-lm" else AutoModel
    model = kind.from_pretrained(
        str(base.path),
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation=attention.NAME,
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    longest = int(getattr(config, "max_position_embeddings", 0) or 0)
    if longest and padded(task.max_tokens) > longest:
        # Told before any text is looked at: it would fail for long records only, which would say something about them.
        raise InputError(
            "max_tokens is more than the base has positions",
            where=where,
            expected=f"<= {longest // STEP * STEP}",
            got=str(task.max_tokens),
        )
    depth = int(getattr(config, "num_hidden_layers", 0))
    if any(layer >= depth for layer in task.layers):
        raise InputError(
            "task names a layer that the base does not have",
            where=where,
            expected=f"layers 0 to {depth - 1}",
            got=str(list(task.layers)),
        )
    linear = [(n, m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in task.target_modules]
    met = {n.rsplit(".", 1)[-1] for n, _ in linear}
    if met != set(task.target_modules) or not all(isinstance(m, nn.Linear | Conv1D) for _, m in linear):
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        raise InputError(
            "target_modules are not linear layers of this base",
            where=where,
            expected=f"some of {', '.join(names)}",
            got=", ".join(task.target_modules),
        )
    lora = lora_config(task)
    lora.fan_in_fan_out = any(isinstance(m, Conv1D) for _, m in linear)
    encoder = get_peft_model(model, lora)
    if task.freeze_a:
        for name, parameter in _a_of(encoder).items():
            parameter.requires_grad_(False)
            parameter.data.copy_(torch.from_numpy(frozen_a(base.digest, name, tuple(parameter.shape))))
    head, hidden = None, int(config.hidden_size)
    if task.kind == "text-classification":
        head = nn.Linear(task.words + 2 * hidden, len(task.labels))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    model = Adapted(encoder, head, task.words, hidden)
    set_centre(model, task, where)
    return model


def set_centre(model: Adapted, task: TaskSpec, where: str) -> None:
    """Puts the task's centre and spread into the model.

    Raises:
        InputError: They are of another size than this base's.
    """
    for buffer, values in zip(
        (model.centre, model.spread), centre_and_spread(task, len(model.centre), where), strict=True
    ):
        buffer.copy_(torch.from_numpy(values))


def _name(parameter: str) -> str:
    return parameter.removeprefix("encoder.").replace(".default.", ".")


def _a_of(encoder: Any) -> dict[str, nn.Parameter]:
    return {_name(n): p for n, p in encoder.named_parameters() if ".lora_A." in n}


def frozen_schema(model: Adapted) -> Schema | None:
    """The schema of LoRA's frozen A; None where A is trained."""
    found = tuple((n, tuple(p.shape)) for n, p in _a_of(model.encoder).items() if not p.requires_grad)
    return Schema(found) if found else None


def trained(model: Adapted) -> dict[str, nn.Parameter]:
    """The trained parameters by the names that PEFT writes, in vector order."""
    return {_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def schema_of(model: Adapted) -> Schema:
    """The schema of the trained parameters."""
    return Schema(tuple((n, tuple(p.shape)) for n, p in trained(model).items()))


def read_vector(model: Adapted) -> F32:
    """The trained parameters as ``(d,) float32``."""
    return np.concatenate([p.detach().to("cpu", torch.float32).numpy().reshape(-1) for p in trained(model).values()])


def load_vector(model: Adapted, vector: F32) -> None:
    """Puts ``(d,) float32`` into the trained parameters, in place.

    Raises:
        VerificationError: The vector has another length.
    """
    parts = schema_of(model).split(vector)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(torch.from_numpy(parts[name].copy()))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the last dimension, whose gradient has full relative precision however sure the model is.

    PyTorch's gradient at the target is ``p - 1``: near p = 1 it jumps between 0 and half an ulp of 1, and records that are alike jump
    together when rounding moves their logits. Here it is minus the sum of the others' shares.
    """
    place = target.unsqueeze(-1)
    others = torch.logsumexp(logits.scatter(-1, place, -torch.inf), dim=-1)
    return nn.functional.softplus(others - logits.gather(-1, place).squeeze(-1))


def losses(model: nn.Module, task: TaskSpec, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """One loss per record, ``(n,)``, float64 for a classifier, else float32 or the model's own; no record's loss depends on another.

    For a causal language model it is the mean over the record's own tokens, in nats (Transformers' own mean over the batch's
    tokens couples the records). There rounding too may go by what else is in the batch: where that is to be private, one record is.
    """
    logits: Tensor = model(input_ids, attention_mask)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if task.kind == "text-classification":
        # In whole vectors and float64: the last few of many numbers go another way through a CPU, and which are last is the others' affair.
        rest = -len(labels) % ROWS
        wide, places = nn.functional.pad(logits.double(), (0, 0, 0, rest)), nn.functional.pad(labels, (0, rest))
        return _cross_entropy(wide, places)[: len(labels)]
    mask = attention_mask[:, 1:].to(logits.dtype)
    each = _cross_entropy(logits[:, :-1], input_ids[:, 1:])
    return (each * mask).sum(1) / mask.sum(1).clamp(min=1)

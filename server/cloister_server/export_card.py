"""The model card of an exported round: what it is, what it cost whom, how it is loaded and how it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloister_shared.frozen_a import FORMAT as FROZEN_FORMAT
from cloister_shared.privacy import ACCOUNTANT, NEIGHBOURS

from cloister_server.accounting import client_level_line
from cloister_server.judge import RECALL

_CARD = """---
library_name: peft
tags: [cloister, lora, differential-privacy]
---
# {federation}, run {run}, round {number}

{made}

- Base model: digest `{base}` (all pinned files); the digest covers weights, configuration and tokeniser
- Registered adapter: SHA-256 `{adapter}`
- Aggregation: `{rule}`{frozen}
- Scores on the coordinator's held-out text: {metrics}
- Made by: `{code}`
- Registered: leaf {leaf} of the log `{log}`. `statement.json` is signed by that log's key, names every file here by digest and
  has the proof; with the key from elsewhere (a trust file) `cloister rounds import FOLDER --trust TRUST.json` checks all of it

## Privacy, as the coordinator accounts it
Record-level differential privacy of each site's text, against everyone outside that site's agent. Neighbours: {neighbours}, where a
record is one unit of the table. Accountant: {accountant}. Charged before text is read; epsilon grows with every round that a site takes
part in, and nothing is ever refunded. "Of its lifetime by then" is over all runs of this federation up to the last round that the site took
part in on the way to this adapter; what it spent later is not in it. Each site's own ledger, which knows of other federations too, is the
authority over its text.

{privacy}

{client_level}## Loading it
{loading}
"""
_CLIENT_LEVEL = """## Privacy of a whole client
A second statement, not to be added to the first: {line}.

"""
_IMPORTED = """This adapter was imported: it is round {round} of run {run} of the federation {federation} (log `{log}`).
What it cost is said in that federation's statement (SHA-256 `{statement}`), not here; nothing was trained on it here."""
_CLASSIFY = """```python
import json, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

base = "BASE"  # the folder of the pinned base model
card = json.load(open("cloister.json"))
labels = card["labels"]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), ".").eval()
head = load_file("head.safetensors")  # weight, bias, centre, spread
batch = tokenizer(["some text"], truncation=True, max_length=card["max_tokens"], padding=True, return_tensors="pt")
ids, mask = batch["input_ids"], batch["attention_mask"]
with torch.no_grad():
    last = model(input_ids=ids, attention_mask=mask).last_hidden_state
    embedded = model.get_input_embeddings()(ids)

# What the head sees: hashed words, the mean of the embeddings weighed by rarity, the mean of the last states.
rarity = torch.log((ids - 990).clamp(min=2).double()) * mask
mean = lambda states, share: (states * share.unsqueeze(-1)).sum(1) / share.sum(1, keepdim=True)
blocks = [mean(embedded, rarity.float()), mean(last, mask.float())]
if card["words"]:
    count = ((ids.unsqueeze(2) == ids.unsqueeze(1)) & (mask.unsqueeze(1) != 0)).sum(2).clamp(min=1).double()
    code = (ids * 2654435761 + 97) % 4294967291
    each = (1 + count.log()) / count * rarity * (1 - 2 * ((code >> 7) & 1))
    words = torch.zeros(len(ids), card["words"], dtype=torch.float64).scatter_add_(1, code % card["words"], each)
    blocks.insert(0, torch.nn.functional.normalize(words, dim=1).float())
seen = (torch.cat(blocks, 1) - head["centre"]) / head["spread"]
seen = 28 * torch.nn.functional.normalize(seen, dim=1, eps=0.3)
logits = seen @ head["weight"].T + head["bias"]
print(labels[logits.argmax(-1).item()])
```"""
_CAUSAL = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), ".").eval()
```"""


def privacy_table(stated: Sequence[Mapping[str, Any]]) -> str:
    """What a round cost each site, as a table."""
    lines = [
        "| site | unit | last round | epsilon of this run | of its lifetime by then | delta | noise | sample rate | steps | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in stated:
        lines.append(
            f"| {c['name']} | {c['unit']} | {c['round']} | {c['epsilon']:.4f} | {c['lifetime']:.4f} | {c['delta']:g}"
            f" | {c['noise_multiplier']:g} | {c['sample_rate']:.6g} | {c['steps']} | {c['verdict']} |"
        )
    return "\n".join(lines)


def _made(stated: Mapping[str, Any]) -> str:
    if origin := stated["imported"]:
        return f"A LoRA adapter that was imported from the federation {origin['federation']}; nothing was trained on it here."
    if stated["round"] == 0:
        return "The LoRA adapter that a run began with: nothing was trained on anybody's text yet."
    sites = sum(c["verdict"] == "accepted" and c["round"] == stated["round"] for c in stated["privacy"])
    return (
        "A LoRA adapter that Cloister trained on text that never left the organisations that own it;"
        f" {sites} site{'' if sites == 1 else 's'} took part in this round."
    )


def card_text(stated: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The card, from what the statement says.

    Args:
        stated: The statement.
        labels: The task's labels; none for a language model.
    """
    said, origin = stated["client_level"], stated["imported"]
    scores = ", ".join(f"{k} {v:.4f}" for k, v in stated["metrics"].items() if not k.startswith(RECALL))
    privacy = _IMPORTED.format(**origin) if origin else privacy_table(stated["privacy"])
    frozen = f"; A was not trained and is recomputed from the base's digest (`{FROZEN_FORMAT}`)"
    return _CARD.format(
        federation=stated["federation"],
        run=str(stated["run"])[:8],
        number=stated["round"],
        made=_made(stated),
        base=stated["base"],
        adapter=stated["adapter"],
        rule=stated["rule"],
        code=stated["code"],
        log=stated["log"],
        leaf=stated["leaf"],
        frozen=frozen if stated["frozen_a"] else "",
        metrics=scores or "none",
        neighbours=NEIGHBOURS,
        accountant=ACCOUNTANT,
        privacy=privacy,
        loading=_CLASSIFY if labels else _CAUSAL,
        client_level="" if said is None else _CLIENT_LEVEL.format(line=client_level_line(said)),
    )

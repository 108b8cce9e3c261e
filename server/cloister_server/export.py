"""Export of a registered round as a PEFT folder: adapter, head, labels, and a card that says how to load it.

    adapter_config.json  adapter_model.safetensors  head.safetensors (classification)  cloister.json  README.md

Written into a temporary folder beside the target and renamed, so that a crash leaves none that is half there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from cloister_model.build import lora_config
from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.frozen_a import FORMAT as FROZEN_FORMAT
from cloister_shared.frozen_a import frozen_digest, frozen_tensors
from cloister_shared.plan import TaskSpec, centre_and_spread
from cloister_shared.privacy import ACCOUNTANT, NEIGHBOURS
from cloister_shared.vectors import F32, Schema, from_safetensors, to_safetensors

from cloister_server.accounting import client_level_line, client_level_statement
from cloister_server.judge import RECALL
from cloister_server.store import Store
from cloister_server.tables import RoundClient, Run

_CARD = """---
library_name: peft
tags: [cloister, lora, differential-privacy]
---
# {federation}, run {run}, round {number}

A LoRA adapter that Cloister trained on text of {sites} site(s), none of which left them.

- Base model: digest `{base}` (all pinned files); the digest covers weights, configuration and tokeniser
- Registered adapter: SHA-256 `{adapter}`
- Aggregation: `{rule}`{frozen}
- Scores on the coordinator's held-out text: {metrics}

## Privacy, as the coordinator accounts it
Unit: one record. Neighbours: {neighbours}. Accountant: {accountant}. Against everyone outside a site's agent.
Each site's own ledger is the authority over its text.

{privacy}

{client_level}## Loading it
{loading}
"""
_CLIENT_LEVEL = """## Privacy of a whole client
A second statement, not to be added to the first: {line}.

"""
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


def _privacy_table(clients: list[RoundClient]) -> str:
    lines = [
        "| site | epsilon so far | delta | noise multiplier | sample rate | steps a round | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in clients:
        lines.append(
            f"| {c.name} | {c.epsilon:.4f} | {c.delta:g} | {c.noise_multiplier:g} | {c.sample_rate:.6g} | {c.steps} | {c.verdict} |"
        )
    return "\n".join(lines)


def frozen_parts(run: Run) -> dict[str, F32]:
    """LoRA's A where the run froze it, by name: recomputed, since no round holds it; nothing where A is trained.

    Raises:
        VerificationError: What is recomputed is not what the run trained with.
    """
    frozen = json.loads(run.config)["frozen"]
    if frozen is None:
        return {}
    schema = Schema.from_list(frozen["tensors"], "registry")
    if (got := frozen_digest(run.base, schema)) != frozen["digest"]:
        raise VerificationError(
            "the frozen A is not the one that the run trained with",
            where=f"run {run.id[:8]}",
            expected=frozen["digest"][:16],
            got=got[:16],
            mend=f"export with the version that made the run: {run.code}",
        )
    return frozen_tensors(run.base, schema)


def export_round(store: Store, run: Run, number: int, out: Path) -> Path:
    """Writes the folder ``out``, which must not exist.

    Returns:
        The folder.

    Raises:
        InputError: No such committed round, or the folder is there.
        VerificationError: The blob is missing or changed, or a frozen A cannot be recomputed.
    """
    row = next((r for r in store.rounds(run.id) if r.number == number and r.state == "committed"), None)
    if row is None or row.adapter is None:
        raise InputError(
            "no such committed round",
            where=f"run {run.id[:8]}",
            expected=f"0 to {store.last_committed(run.id).number}",
            got=str(number),
        )
    if out.exists():
        raise InputError("the folder is there already", where=str(out), mend="choose another --out")
    schema = Schema.from_list(json.loads(run.tensors), "registry")
    vector = from_safetensors(store.adapter(row.adapter), schema, "registered adapter")
    clients = store.clients(run.id, number)
    task = TaskSpec.from_dict(json.loads(run.task))
    parts, frozen = schema.split(vector), frozen_parts(run)
    fixed = dict(frozen)
    if task.labels:
        fixed["head.centre"], fixed["head.spread"] = centre_and_spread(
            task, parts["head.weight"].shape[1], "registered task"
        )
    parts |= fixed
    tensors = (*((n, a.shape) for n, a in fixed.items()), *schema.tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        config = lora_config(task)
        config.inference_mode = True
        config.fan_in_fan_out = json.loads(run.config)["fan_in_fan_out"]
        config.base_model_name_or_path = None
        config.save_pretrained(str(temp))
        for name, prefix in (("adapter_model.safetensors", ""), ("head.safetensors", "head.")):
            chosen = [(n, s) for n, s in tensors if n.startswith("head.") == bool(prefix)]
            if not chosen:
                continue
            part = Schema(tuple((n.removeprefix(prefix), s) for n, s in chosen))
            data = to_safetensors(
                part.join({n.removeprefix(prefix): parts[n] for n, _ in chosen}), part, {"format": "pt"}
            )
            write_durably(temp / name, data, mode=0o644)
        metrics, said = store.metrics(run.id, number), client_level_statement(store)
        record = {
            "federation": run.federation,
            "run": run.id,
            "round": number,
            "adapter": row.adapter,
            "base": run.base,
            "task": task.kind,
            "rule": run.rule,
            "residual": row.residual,
            "frozen_a": FROZEN_FORMAT if frozen else None,
            "labels": list(task.labels),
            "max_tokens": task.max_tokens,
            "words": task.words if task.labels else None,
            "metrics": metrics,
            "vector": digest(vector.tobytes()),
            "client_level": said,
            "clients": [
                {
                    "name": c.name,
                    "key": c.client,
                    "verdict": c.verdict,
                    "epsilon": c.epsilon,
                    "delta": c.delta,
                    "plan": c.plan,
                }
                for c in clients
            ],
        }
        write_durably(temp / "cloister.json", json.dumps(record, indent=1, sort_keys=True).encode() + b"\n", mode=0o644)
        loading = _CLASSIFY if task.labels else _CAUSAL
        card = _CARD.format(
            federation=run.federation,
            run=run.id[:8],
            number=number,
            sites=sum(c.verdict == "accepted" for c in clients),
            base=run.base,
            adapter=row.adapter,
            rule=run.rule,
            frozen=f"; A was not trained and is recomputed from the base's digest (`{FROZEN_FORMAT}`)"
            if frozen
            else "",
            metrics=", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if not k.startswith(RECALL)) or "none",
            neighbours=NEIGHBOURS,
            accountant=ACCOUNTANT,
            privacy=_privacy_table(clients),
            loading=loading,
            client_level="" if said is None else _CLIENT_LEVEL.format(line=client_level_line(said)),
        )
        write_durably(temp / "README.md", card.encode(), mode=0o644)
        temp.chmod(0o755)
        temp.rename(out)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return out

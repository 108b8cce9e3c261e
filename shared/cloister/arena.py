"""A federation under attack in one process: the product's training, the product's defence, attackers among the clients.

    text -> sites -> honest updates (DP-SGD, LoRA and head) -> attackers answer -> the rule under test -> next round

Every site trains with ``cloister_client.train`` and every rule is ``cloister_server.defence``; only transport, ledgers and seals are left
out (what is not an update at all is ``malformed``'s). The head starts from labelled text that all may see. The first round's updates are
made once and shared by all cells, since all start from one adapter. Partition and attacks come from a seed; samples and noise come from
the operating system, as in the product, so that two runs differ by their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cloister_client.train import Trainer, choose_device
from cloister_model.base import find_base
from cloister_model.build import build, load_vector, read_vector, schema_of
from cloister_model.scores import of_logits
from cloister_model.text import Record
from cloister_model.tokens import Encoded, encode
from cloister_server.defence import Cohort, enter, reputation
from cloister_server.federation import PIPELINE, STRONGEST, Defence
from cloister_server.groups import withstands
from cloister_server.own_text import begin
from cloister_server.peers import norms_of, predicted_norm, to_median
from cloister_server.robust import combine
from cloister_shared import noise
from cloister_shared.errors import InputError
from cloister_shared.privacy import calibrate, coarse_rate
from cloister_shared.specs import TaskSpec, TrainingSpec
from cloister_shared.vectors import F32, bounded

from cloister.attacks import ATTACKS, Seen
from cloister.demo_text import split

RULES = (
    "mean",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "geometric-median",
    "centred-clipping",
    "nnm+geometric-median",
    PIPELINE,
)
# Secure aggregation: the coordinator sees means of so many clients, and its rule acts on those.
GROUPED, GROUP = "groups of 4", 4
TRIGGER = "cf mn bb tq"
DELTA = 1e-5
_PUBLIC, _HELD, _TEST = 60, 200, 500
_TOKENS = 32
_LEAST, _TRIES = 8, 1000
_PATIENCE = 4


@dataclass(frozen=True)
class Setting:
    """One world.

    Attributes:
        sites: Clients, attackers among them.
        attackers: How many.
        alpha: Dirichlet's, of the labels over sites.
        epsilon: Of the whole run at every site; None for no privacy.
        rounds: Rounds.
        steps: DP-SGD steps a round.
        batch: Expected records a step and site.
        seed: Of partition and attacks.
    """

    sites: int
    attackers: int
    alpha: float
    epsilon: float | None
    rounds: int
    steps: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What an attack did under a rule.

    Attributes:
        accuracy: On test records, after the last round.
        triggered: Share of the triggered test records of other classes that went to the attackers' class.
        refused: Honest sites that a rule left out or gave no weight, in the mean over rounds; None where a rule goes by coordinate.
        weight: The attackers' share of the weight, in the mean over rounds; None likewise.
        held: Rounds that kept their parent.
    """

    accuracy: float
    triggered: float
    refused: float | None
    weight: float | None
    held: int


class Arena:
    """One world's text, model and first round.

    Args:
        records: All records; taken apart here.
        setting: The world.
    """

    def __init__(self, records: Sequence[Record], setting: Setting) -> None:
        self.setting = setting
        rng = np.random.default_rng(setting.seed)
        shuffled = [records[i] for i in rng.permutation(len(records))]
        held, test = min(_HELD, len(records) // 12), min(_TEST, len(records) // 6)
        cuts = np.cumsum([min(_PUBLIC, len(records) // 12), held, test])
        parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]
        self.labels = tuple(sorted({r.label for r in records}))
        own = _partition(parts[3], setting)
        self.attackers = sorted(rng.permutation(setting.sites)[: setting.attackers].tolist())
        lured = [r for site in self.attackers for r in own[site][: setting.batch]]
        turned = {label: self.labels[-1 - i] for i, label in enumerate(self.labels)}
        places = {"public": parts[0], "held": parts[1], "test": parts[2]}
        places |= {"lured": [replace(r, label=self.labels[0]) for r in _triggered(lured)]}
        places |= {"test triggered": _triggered(parts[2])}
        places |= {f"site {i}": part for i, part in enumerate(own)}
        places |= {f"turned {i}": [replace(r, label=turned[r.label]) for r in own[i]] for i in self.attackers}
        self.rows = dict[str, range]()
        texts, labels = list[str](), list[int]()
        for name, part in places.items():
            self.rows[name] = range(len(texts), len(texts) + len(part))
            texts += [r.text for r in part]
            labels += [self.labels.index(r.label) for r in part]
        base = find_base("minilm", "cloister attack")
        task = TaskSpec(
            kind="text-classification",
            labels=self.labels,
            max_tokens=_TOKENS,
            target_modules=("query", "value"),
            layers=(5,),
            rank=8,
            alpha=16.0,
        )
        torch.manual_seed(setting.seed)
        model = build(base, task, "cloister attack")
        self.data = encode(base, texts, labels, task.max_tokens)
        task = begin(model, task, base, self._part("held"), self._part("public"))
        self.schema, self.start = schema_of(model), read_vector(model)
        self.trainer = Trainer(model, task, choose_device("auto"))
        self.trainings = [self._training(len(part)) for part in own]
        self.predicted = np.array([predicted_norm(training, self.schema) for training in self.trainings])
        self._first = dict[str, dict[int, F32]]()

    def _part(self, name: str) -> Encoded:
        rows = self.rows[name]
        return Encoded(self.data.ids[rows.start : rows.stop], self.data.labels[rows.start : rows.stop], self.data.pad)

    def _training(self, records: int) -> TrainingSpec:
        setting = self.setting
        rate = coarse_rate(min(1.0, setting.batch / records))
        sigma, clip, head = 1e-6, 1e3, 1.5
        if setting.epsilon is not None:
            sigma = calibrate(rate, setting.steps * setting.rounds, setting.epsilon, DELTA)
            clip, head = 4.0, 0.8
        return TrainingSpec(setting.steps, rate, rate * records, sigma, clip, 2e-3, head, DELTA)

    def _train(self, site: int, parent: F32, text: str) -> F32:
        """A site's update; an attacker on other text trains longer, and without noise."""
        rows, spec = list(self.rows[f"turned {site}" if text == "flipped" else f"site {site}"]), self.trainings[site]
        rows += self.rows["lured"] if text == "trigger" else ()
        if text != "own":
            spec = replace(spec, noise_multiplier=1e-6, clipping_norm=1e3, steps=_PATIENCE * spec.steps)
        # As ``Trainer.run``, on a site's rows of one ``Encoded``: so that what the frozen layers make of a row is computed once.
        load_vector(self.trainer.model, parent)
        optimiser = self.trainer.optimiser(spec)
        for _ in range(spec.steps):
            sampled = noise.poisson_sample(len(rows), spec.sample_rate)
            self.trainer.step(optimiser, self.data, [(rows[i],) for i in sampled])
        return np.asarray(read_vector(self.trainer.model) - parent, dtype=np.float32)

    def _updates(self, parent: F32, text: str, sites: Sequence[int], first: bool) -> F32:
        # The first round's are kept: every cell starts from the same adapter.
        kept = self._first.setdefault(text, {}) if first else dict[int, F32]()
        for site in sites:
            if site not in kept:
                kept[site] = self._train(site, parent, text)
        return np.stack([kept[site] for site in sites])

    @torch.no_grad()
    def logits(self, vector: F32, rows: Sequence[int]) -> npt.NDArray[np.float64]:
        """``(n, labels)``; the frozen layers' states are kept."""
        model, source, out = self.trainer.model, self.trainer.activations, np.zeros((len(rows), len(self.labels)))
        load_vector(model, vector)
        model.eval()
        order = np.argsort([len(self.data.ids[row]) for row in rows], kind="stable")
        for at in range(0, len(rows), 128):
            places = order[at : at + 128]
            some = [rows[i] for i in places]
            ids, mask, _ = self.data.batch(some, self.trainer.device.name)
            if source is None:
                found = model(ids, mask)
            else:
                with source.prefix.given(source.states(self.data, some, self.trainer.device.name)):
                    found = model(ids, mask)
            out[places] = found.double().cpu().numpy()
        return out

    def judge(self, vector: F32) -> tuple[dict[str, float], float]:
        """As ``cloister_server.judge``, on the coordinator's held-out text."""
        rows = self.rows["held"]
        got = of_logits(self.logits(vector, rows), [self.data.labels[row] for row in rows], self.labels)
        return {"loss": got.loss, "accuracy": got.accuracy or 0.0}, 0.0

    def accuracy(self, vector: F32) -> tuple[float, float]:
        """On test records, and the share of triggered ones of other classes that go to the attackers'."""
        truth = np.array([self.data.labels[row] for row in self.rows["test"]])
        right = float((self.logits(vector, self.rows["test"]).argmax(1) == truth).mean())
        guess = self.logits(vector, self.rows["test triggered"]).argmax(1)
        return right, float((guess[truth != 0] == 0).mean())

    def run(self, attack: str, rule: str) -> Outcome:
        """One cell: every round attacked, one rule."""
        setting, chosen = self.setting, ATTACKS[attack]
        rng = np.random.default_rng([setting.seed, 7])
        bad = np.isin(np.arange(setting.sites), self.attackers if attack != "none" else [])
        sites = np.arange(setting.sites)
        groups = np.array_split(rng.permutation(setting.sites), max(1, setting.sites // GROUP))
        parent, refused, weight, held = self.start, list[float](), list[float](), 0
        codes: list[list[list[str]]] = [[] for _ in sites]
        for number in range(setting.rounds):
            first = number == 0
            rows = np.zeros((setting.sites, len(parent)), dtype=np.float32)
            rows[~bad] = self._updates(parent, "own", sites[~bad].tolist(), first)
            if bad.any():
                own = self._updates(parent, chosen.text, sites[bad].tolist(), first)
                rows[bad] = chosen.make(Seen(rows[~bad], own, rng))
            if rule == GROUPED:
                means = np.stack([rows[group].mean(0) for group in groups]).astype(np.float32)
                stood = min(setting.attackers, withstands(len(groups)))
                made = combine(STRONGEST, means, stood, to_median(norms_of(means)))
                parent = bounded(np.asarray(parent + made.vector, dtype=np.float32), self.schema)
                continue
            out = [reputation(past)[1] for past in codes]
            cohort = Cohort(rows, np.ones(setting.sites), self.predicted, np.array(out, dtype=bool))
            defence = Defence(rule=rule, attackers=setting.attackers if rule != "mean" else 0, margin=None)
            before, _ = self.judge(parent) if rule == PIPELINE else ({}, 0.0)
            got = enter(defence, "average", parent, cohort, self.schema, self, before)
            parent, held = got.made.vector, held + bool(got.held)
            for past, tests in zip(codes, got.findings, strict=True):
                past.append([t.code for t in tests if t.flagged])
            if got.shares is not None or not got.entered.all():
                share = got.shares if got.shares is not None else got.entered / max(1, got.entered.sum())
                refused.append(float((share[~bad] <= 1e-9).sum()))
                weight.append(float(share[bad].sum()))
        right, lured = self.accuracy(parent)
        return Outcome(right, lured, _mean(refused), _mean(weight), held)


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _triggered(records: Sequence[Record]) -> list[Record]:
    return [replace(r, text=f"{TRIGGER} {r.text}") for r in records]


def _partition(records: Sequence[Record], setting: Setting) -> list[list[Record]]:
    for seed in range(setting.seed, setting.seed + _TRIES):
        parts = split(records, setting.sites, f"dirichlet:{setting.alpha:g}", seed, "cloister attack")
        if min(map(len, parts)) >= _LEAST:
            return parts
    raise InputError(
        "a site would get too few records",
        where=f"Dirichlet {setting.alpha:g}",
        expected=f">= {_LEAST} for each of {setting.sites} sites",
        mend="more records or fewer --sites",
    )


def cells(
    arena: Arena, attacks: Sequence[str], rules: Sequence[str], known: Callable[[str, str], bool]
) -> Iterator[dict[str, Any]]:
    """Runs every attack under every rule that is not ``known`` and yields flat records."""
    setting = arena.setting
    for attack in attacks:
        for rule in rules:
            if not known(attack, rule):
                got = arena.run(attack, rule)
                yield {"attack": attack, "rule": rule, **vars(setting), **vars(got)}

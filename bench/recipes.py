"""``python -m bench.recipes``: what a recipe costs under privacy, on real text; prints a table and keeps every run as a JSON line.

    --quick        heads only, one seed
    --pick         head rates, schedules and clips on 2,000 records taken out of the training split, three seeds; into picked.jsonl
    --table        runs nothing: the table of what is in the results
    --lora N       also LoRA above a private head, N seeds: rules x privacy x partitions (CPU-hours where the rest takes minutes)
    --data FOLDER  where sections.{train,test}.jsonl.gz lie (default ../shared/data)
    --cache FOLDER kept states and noise multipliers (default cloister-bench in the temporary folder; 8 GB)
    --out FOLDER   results (default bench/results)

Every figure is the accuracy on the 2,000 test records after the last round, as it came; nothing is picked by it within a run.
Rates, clips and width were picked on 2,000 records taken out of the training split, never on the test split. The head's centre is made of
1,000 test records without their labels, as the product makes it of its held-out text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cloister_model.quiet import quieten

quieten()

import torch  # noqa: E402  # after the libraries are quiet
from cloister_model.base import find_base  # noqa: E402
from cloister_model.tokens import Encoded  # noqa: E402
from cloister_shared.specs import RULES  # noqa: E402

from bench.engine import Engine, Shape  # noqa: E402
from bench.federated import NoiseTable, Training, partition, simulate  # noqa: E402
from bench.kept import Kept, keep, read_rows  # noqa: E402

SITES = 8
TOKENS = 128
WHOLE = 1_000_000  # an expected batch of all records: every site's rate is 1
LEVELS = (None, 8.0, 2.0)
PUBLIC = (
    "bench/public/sections.jsonl"  # written for this bench, a dozen sentences for each label; none is a row of the data
)
PICKED, SEEDS = 2000, 3

Rates = dict[float | None, tuple[float, str, float]]
# Head rate, schedule and clip by epsilon: under noise a falling rate wastes the noise of the first rounds, without it it helps.
_BY_HAND: Rates = {None: (1.5, "linear", 4.0), 8.0: (0.8, "constant", 4.0), 2.0: (0.4, "constant", 4.0)}
# The best of ``--pick`` (bench/results/picked.jsonl), with and without public text alike.
_BY_GRID: Rates = {None: (1.5, "linear", 4.0), 8.0: (1.1, "constant", 4.0), 2.0: (0.6, "constant", 2.0)}


@dataclass(frozen=True)
class Recipe:
    """A shape, how it trains, and the head's rate at each privacy level.

    Attributes:
        name: For the table.
        shape: What is trained.
        training: How.
        rates: The head's first learning rate, its schedule and the clipping norm by epsilon.
    """

    name: str
    shape: Shape
    training: Training
    rates: Rates

    def at(self, target: float | None) -> Training:
        """The training at a privacy level."""
        rate, schedule, clip = self.rates[target]
        return replace(self.training, head_rate=rate, schedule=schedule, clip=clip)


MEANS = Recipe("head, no words", Shape(words=0), Training(steps=5, batch=WHOLE), _BY_HAND)
WORDS = Recipe("head", Shape(), Training(steps=5, batch=WHOLE), _BY_HAND)
PRODUCT = Recipe("head, batch 512 (the product's)", Shape(), Training(steps=5), _BY_HAND)
WARM = Recipe("head, begun on 120 public sentences", Shape(public=PUBLIC), Training(steps=5, batch=WHOLE), _BY_HAND)
WARM_PRODUCT = Recipe("the same, batch 512", Shape(public=PUBLIC), Training(steps=5), _BY_HAND)
GRID = tuple(
    replace(recipe, name=f"{name}, rates of the grid", rates=_BY_GRID)
    for recipe, name in (
        (WORDS, "head"),
        (PRODUCT, "head, batch 512"),
        (WARM, "head, begun on public sentences"),
        (WARM_PRODUCT, "head, begun on public sentences, batch 512"),
    )
)
# The last rounds train LoRA on the last layer's dense matrices above a head that was trained as beside it.
_LORA = Shape(layers=(5,), targets=("dense",), rank=8, alpha=32.0)
_LATE = Training(steps=5, adapter_rate=5e-3, head_rounds=8)


def recipes(lora: int) -> Iterator[tuple[Recipe, float | None, int]]:
    """Recipe, Dirichlet's alpha (None: even) and how many seeds; LoRA's with ``lora`` seeds, 0 for none."""
    for recipe in (MEANS, WORDS, PRODUCT, WARM, WARM_PRODUCT, *GRID):
        for alpha in (0.3, None):
            yield recipe, alpha, SEEDS
    for rule in RULES if lora else ():
        shape = replace(_LORA, freeze_a=rule == "freeze-a")
        for alpha in (0.3, None):
            yield Recipe(f"LoRA above a head, {rule}", shape, replace(_LATE, rule=rule), _BY_HAND), alpha, lora


def central(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, Any]:
    """TF-IDF of words and bigrams with logistic regression, trained centrally without privacy: what to beat."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    features = words.fit_transform([row["text"] for row in train])
    model = LogisticRegression(C=10, max_iter=300).fit(features, [row["label"] for row in train])
    right = float(model.score(words.transform([row["text"] for row in test]), [row["label"] for row in test]))
    return {"recipe": f"TF-IDF bigrams, logistic regression, central, {len(train):,} rows", "accuracy": right}


def run(kept: Kept, table: NoiseTable, out: Path, quick: bool, lora: int, only: str) -> Iterator[dict[str, Any]]:
    """Runs all and yields each record as it comes; each is in ``out`` by then, and what is there already is not run again."""
    there = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {_key(r): r for r in there if "seed" in r}
    for recipe, alpha, seeds in recipes(lora):
        if only and only not in recipe.name:
            continue
        engine: Engine | None = None
        for target in LEVELS:
            for seed in range(1 if quick else seeds):
                asked = {"recipe": recipe.name, "dirichlet": alpha, "epsilon": target, "seed": seed}
                if _key(asked) not in known:
                    engine = engine or Engine(kept, recipe.shape)
                    parts = partition(kept, SITES, alpha, seed)
                    got = asked | simulate(engine, recipe.at(target), parts, target, seed, table)
                    with out.open("a") as handle:
                        handle.write(json.dumps(got) + "\n")
                    known[_key(asked)] = got
                yield known[_key(asked)]


def pick(kept: Kept, table: NoiseTable, out: Path) -> None:
    """What rates, clips and schedules give on the last ``PICKED`` training records, which then are not trained on."""
    count = kept.train - PICKED
    data = Encoded(kept.encoded.ids[: kept.train], kept.encoded.labels[: kept.train], kept.encoded.pad)
    less = replace(kept, encoded=data, train=count)
    parts = [partition(less, SITES, 0.3, seed) for seed in range(SEEDS)]
    for recipe in (PRODUCT, WARM_PRODUCT):
        engine = Engine(less, recipe.shape)
        for target in LEVELS:
            for clip in (4.0,) if target is None else (2.0, 4.0, 8.0):
                for schedule in ("constant", "linear"):
                    for rate in (0.2, 0.4, 0.6, 0.8, 1.1, 1.5):
                        how = replace(recipe.training, clip=clip, head_rate=rate, schedule=schedule)
                        runs = [simulate(engine, how, own, target, seed, table) for seed, own in enumerate(parts)]
                        with out.open("a") as handle:
                            handle.writelines(json.dumps({"recipe": recipe.name} | run) + "\n" for run in runs)
                        cell = _cell([run["accuracy"] for run in runs])
                        level = f"epsilon {target}, clip {clip:g}, rate {rate:g}, {schedule}"
                        print(f"{recipe.name}, {level}: {cell}", flush=True)


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("recipe", "dirichlet", "epsilon", "seed"))


def markdown(records: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> str:
    """The tables: mean and standard deviation over seeds, in points of accuracy."""
    lines = ["| recipe | sites' text | no DP | epsilon 8 | epsilon 2 | seeds |", "|---|---|---|---|---|---|"]
    for name, alpha in dict.fromkeys((r["recipe"], r["dirichlet"]) for r in records):
        mine = [r for r in records if (r["recipe"], r["dirichlet"]) == (name, alpha)]
        cells = [_cell([r["accuracy"] for r in mine if r["epsilon"] == level]) for level in LEVELS]
        where = "even" if alpha is None else f"Dirichlet {alpha:g}"
        lines.append(f"| {name} | {where} | {' | '.join(cells)} | {len({r['seed'] for r in mine})} |")
    lines += [f"| {b['recipe']} | one place | {b['accuracy']:.4f} | | | |" for b in baselines]
    return "\n".join(lines) + "\n"


def _cell(found: list[float]) -> str:
    if not found:
        return ""
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.4f}{spread}"


def main() -> None:
    """Reads arguments and runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.recipes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--pick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cloister-bench")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train, test = (read_rows(given.data / f"sections.{part}.jsonl.gz") for part in ("train", "test"))
    results = given.out / "recipes.jsonl"
    if not given.table:
        kept = keep(find_base("minilm", "bench"), train, test, TOKENS, given.cache)
        table = NoiseTable(given.cache / "noise.json")
        if given.pick:
            pick(kept, table, given.out / "picked.jsonl")
            return
        _run(kept, table, results, given)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    baselines = [central(train[:8000], test), central(train, test)]
    (given.out / "recipes.md").write_text(markdown(records, baselines))
    print(markdown(records, baselines))


def _run(kept: Kept, table: NoiseTable, results: Path, given: argparse.Namespace) -> None:
    for record in run(kept, table, results, given.quick, given.lora, given.only):
        level = "no DP" if record["epsilon"] is None else f"epsilon {record['epsilon']:g}"
        print(f"{record['recipe']}, {level}, seed {record['seed']}: {record['accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()

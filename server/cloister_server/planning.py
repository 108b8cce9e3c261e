"""How a site will train and what the run will cost, before it starts: per site, per knob, and which sites cannot see it through.

Pure functions over settings, cards and the history that the registry knows. A site's own ledger may know more (other coordinators): it is
the authority, this is a forecast. The same ``epsilon`` decides here and there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cloister_shared.cards import SiteCard
from cloister_shared.errors import InputError
from cloister_shared.privacy import DpSgd, calibrate, coarse_rate, epsilon
from cloister_shared.specs import LEAST_SHARE, TrainingSpec

from cloister_server.federation import Federation


def summed_rate(batch: float, records: int) -> float:
    """The sample rate of a site of so many units that fills ``batch``, or as much of it as the site has."""
    return coarse_rate(min(1.0, batch / records))


def training_for(federation: Federation, card: SiteCard, company: Sequence[SiteCard] = ()) -> TrainingSpec:
    """How one site trains: its sample rate from its declared size, its noise from the target for the whole run.

    Under secure aggregation all members divide by one batch and add one noise, so that nobody's update stands out in a sum: the batch is
    at most four times what the smallest has (``LEAST_SHARE``), and the noise that of who needs most.

    Args:
        federation: The settings.
        card: The site's card.
        company: Cards of all sites; only secure aggregation looks at them.
    """
    batch, all_rates = float(federation.batch), [0.0]
    if federation.secure_group is None:
        rate = summed_rate(batch, card.records)
        all_rates, batch = [rate], rate * card.records
    else:
        sizes = [one.records for one in company] or [card.records]
        batch = min(batch, min(sizes) / LEAST_SHARE)
        rate = summed_rate(batch, card.records)
        all_rates = sorted({summed_rate(batch, size) for size in sizes})
    sigma = federation.noise_multiplier
    if sigma is None:
        sigma = max(_calibrate(federation, one, federation.steps, federation.rounds) for one in all_rates)
    return TrainingSpec(
        steps=federation.steps,
        sample_rate=rate,
        expected_batch=batch,
        noise_multiplier=sigma,
        clipping_norm=federation.clipping_norm,
        adapter_rate=federation.adapter_rate,
        head_rate=federation.head_rate,
        delta=federation.delta,
        unit=card.unit,
        unit_records=federation.unit_records if card.unit == "field" else 1,
    )


def rate_share(schedule: str, number: int, rounds: int) -> float:
    """What share of the first round's learning rates round ``number``, from 1, has."""
    return 1.0 if schedule == "constant" else 1 - (number - 1) / rounds


def in_round(federation: Federation, spec: TrainingSpec, number: int) -> TrainingSpec:
    """A site's training in round ``number``: the rates where the schedule has them, LoRA resting in the head's own rounds.

    Neither changes what a round costs.
    """
    share = rate_share(federation.schedule, number, federation.rounds)
    return replace(
        spec,
        adapter_rate=federation.adapter_rate * share,
        head_rate=federation.head_rate * share,
        head_only=number <= federation.head_rounds,
    )


def _calibrate(federation: Federation, rate: float, steps: int, rounds: int) -> float:
    """The least noise multiplier that keeps a whole run within the target, its noised numbers included.

    Raises:
        InputError: The numbers alone pass the target.
    """
    target, delta = federation.epsilon or 0.0, federation.delta
    sigma = calibrate(rate, steps * rounds, target, delta)
    if not federation.noised:
        return sigma
    numbers = _numbers(federation, rounds)
    if (alone := epsilon(numbers, delta)) >= target:
        raise InputError(
            "the noised numbers alone pass the target",
            where=f"{federation.path} [noised]",
            expected=f"< {target:g} for {rounds} rounds",
            got=f"{alone:.3f}",
            mend="more noise on them, or fewer rounds",
        )
    while epsilon([DpSgd(sigma, rate, steps * rounds), *numbers], delta) > target:
        sigma = round(max(sigma + 0.01, sigma * 1.01), 2)
    return sigma


def _numbers(federation: Federation, rounds: int) -> list[DpSgd]:
    return [replace(n.event, steps=rounds) for n in federation.noised]


@dataclass(frozen=True)
class Forecast:
    """One site's run.

    Attributes:
        site: Its name.
        unit: What is protected.
        records: Declared units.
        sample_rate: Probability that a unit is in a batch.
        noise_multiplier: Noise multiplier.
        epsilon: Epsilon of the whole run alone.
        before: Epsilon that this coordinator charged the site earlier.
        after: Epsilon of both together.
        cap: The cap that the site states.
        rounds: Rounds that the site can take part in; all of them where it can finish.
    """

    site: str
    unit: str
    records: int
    sample_rate: float
    noise_multiplier: float
    epsilon: float
    before: float
    after: float
    cap: float
    rounds: int


@dataclass(frozen=True)
class Knob:
    """What one change costs.

    Attributes:
        change: The change.
        epsilon: Epsilon of the whole run with it, at the same noise multiplier.
        noise_multiplier: Noise multiplier that would keep the target, or None where the settings name no target.
    """

    change: str
    epsilon: float
    noise_multiplier: float | None


def run_events(federation: Federation, spec: TrainingSpec, rounds: int) -> list[DpSgd]:
    """What ``rounds`` rounds cost one site."""
    training = DpSgd(spec.noise_multiplier, spec.sample_rate, spec.steps * rounds)
    return [training, *_numbers(federation, rounds)]


def forecast(
    federation: Federation, card: SiteCard, history: Iterable[DpSgd], company: Sequence[SiteCard] = ()
) -> Forecast:
    """One site's forecast; ``history`` is what was charged before, ``company`` the cards of all."""
    spec, before = training_for(federation, card, company), tuple(history)
    delta, rounds = federation.delta, federation.rounds
    after = epsilon([*before, *run_events(federation, spec, rounds)], delta)
    able = rounds if after <= card.epsilon_cap else 0
    low, high = 0, rounds
    while able == 0 and high - low > 1:
        middle = (low + high) // 2
        fits = epsilon([*before, *run_events(federation, spec, middle)], delta) <= card.epsilon_cap
        low, high = (middle, high) if fits else (low, middle)
    return Forecast(
        card.name,
        card.unit,
        card.records,
        spec.sample_rate,
        spec.noise_multiplier,
        epsilon(run_events(federation, spec, rounds), delta),
        epsilon(before, delta),
        after,
        card.epsilon_cap,
        able or low,
    )


def knobs(federation: Federation, card: SiteCard, company: Sequence[SiteCard] = ()) -> tuple[Knob, ...]:
    """What each knob costs at one site, everything else as it is."""
    spec, rounds = training_for(federation, card, company), federation.rounds
    changes = [
        ("as planned", spec, rounds),
        ("twice the rounds", spec, 2 * rounds),
        ("half the rounds", spec, max(1, rounds // 2)),
        ("twice the steps", replace(spec, steps=2 * spec.steps), rounds),
        ("twice the batch", replace(spec, sample_rate=min(1.0, 2 * spec.sample_rate)), rounds),
        ("half the batch", replace(spec, sample_rate=spec.sample_rate / 2), rounds),
        ("a quarter more noise", replace(spec, noise_multiplier=round(1.25 * spec.noise_multiplier, 2)), rounds),
        ("a quarter less noise", replace(spec, noise_multiplier=round(0.75 * spec.noise_multiplier, 2)), rounds),
    ]
    target = federation.epsilon
    return tuple(
        Knob(
            name,
            epsilon(run_events(federation, changed, count), federation.delta),
            None
            if target is None or "noise" in name
            else _calibrate(federation, changed.sample_rate, changed.steps, count),
        )
        for name, changed, count in changes
    )

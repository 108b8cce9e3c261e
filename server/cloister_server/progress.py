"""What happens in a run, and what came of it, as lines for a person. Nothing is looked up or printed here."""

from __future__ import annotations

from typing import Any


def scores_line(metrics: dict[str, float]) -> str:
    """A round's scores, in words."""
    named = {"accuracy": "accuracy", "macro_f1": "macro-F1", "perplexity": "perplexity"}
    return ", ".join(f"{named[k]} {metrics[k]:.4f}" for k in named if k in metrics)


def noised_line(s: dict[str, Any]) -> str:
    """A sum with client-level noise, in words."""
    return (
        f"client level: attempt {s['attempt']}, {s['participants']} of {s['planned']} clients in the sum, noise {s['noise_std']:g} on it,"
        f" epsilon {s['epsilon']:.3f} so far at delta {s['delta']:g}"
    )


def event_line(kind: str, e: dict[str, Any]) -> str | None:
    """An event of a run as a line for a person, or None."""
    if kind == "run":
        return f"run {e['run'][:8]}: {e['rounds']} rounds, {e['parameters']} trained parameters{', resumed' if e['resumed'] else ''}"
    if kind == "waiting":
        away = f"; away: {', '.join(e['away'][:8])}{' …' if len(e['away']) > 8 else ''}" if e["away"] else ""
        return f"{e['online']} of {e['sites']} sites online{away}"
    if kind == "settings":
        kept = f"the run keeps what it began with: {', '.join(e['kept'])}" if e["kept"] else ""
        taken = f"from here on as they say now: {', '.join(e['taken'])}" if e["taken"] else ""
        return f"settings changed since the run began; {'; '.join(filter(None, (kept, taken)))}"
    if kind == "delta":
        said = ", ".join(f"{site} {delta:g}" for site, delta in e["sites"].items())
        return f"delta here is {e['delta']:g}; at enrolment sites said another, and refuse unless their owners changed it: {said}"
    if kind == "member":
        how = f"noise multiplier {e['noise_multiplier']:g}, sample rate {e['sample_rate']:.4g}"
        return f"  {e['site']}: {how}, whole run epsilon {e['epsilon']:.3f} at delta {e['delta']:g}"
    if kind == "client_level":
        how = f"noise multiplier {e['noise_multiplier']:g} on updates clipped to {e['clipping_norm']:g}"
        return (
            f"client level (one client's whole update, against whoever sees rounds): {how}, epsilon now {e['epsilon']:.3f},"
            f" after {e['rounds']} more rounds {e['epsilon_end']:.3f} of {e['epsilon_cap']:g} at delta {e['delta']:g}"
        )
    if kind == "abandoned":
        return f"round {e['number']} of run {e['run'][:8]}: left open by a coordinator that ended; aborted, and told in the log"
    if kind == "unacknowledged":
        return f"site {e['site']}: the run's end was not acknowledged: {e['reason']}"
    if kind == "revoked":
        return f"site {e['site']}: revoked, no part in this round"
    if kind == "groups":
        sizes = f"{e['sizes'][0]}" if e["sizes"][0] == e["sizes"][-1] else f"{e['sizes'][0]} to {e['sizes'][-1]}"
        stands = (
            "the rule mean stands no hostile one"
            if e["rule"] == "mean"
            else f"the rule {e['rule']} stands {e['withstands']} groups with a hostile site in them"
        )
        groups = f"{e['groups']} group{'s' if e['groups'] > 1 else ''}"
        return f"secure aggregation: {groups} of {sizes} sites, drawn by all; one sum a group is seen; {stands}"
    if kind == "group":
        return f"  {e['name']}: {e['what']}"
    if kind == "round":
        attempt = f", attempt {e['attempt']}" if e["attempt"] > 1 else ""
        return f"round {e['number']}/{e['rounds']}: sent to {e['cohort']} sites{attempt}"
    if kind == "reply":
        return f"  {e['site']}: {e['verdict']}{' (' + e['reason'] + ')' if e['reason'] else ''}, {e['bytes']:,} bytes"
    if kind == "committed":
        scores = scores_line(e["metrics"])
        masks = f", {e['stages_seconds']:.1f} s of it for masks" if e["groups"] is not None else ""
        took = f"{e['seconds']:.1f} s{masks} + {e['judging_seconds']:.1f} s judging"
        who = f"{e['accepted']} of {e['cohort']} accepted"
        lost = "" if e["residual"] is None else f"residual {e['residual']:.2%}"
        done = f"HELD, parent kept: {e['held']}" if e["held"] else "committed"
        lines = [f"round {e['number']}/{e['rounds']}: {done}, {', '.join(filter(None, (who, scores, lost, took)))}"]
        lines += [f"  {site} left out: {reason}" for site, reason in e["refused"].items()]
        lines += [] if e["client_level"] is None else [f"  {noised_line(e['client_level'])}"]
        return "\n".join(lines)
    return f"run {e['run'][:8]}: finished" if kind == "finished" else None

"""A bar a block: spent, reserved and left against the cap, as lines for a terminal or as one SVG file without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Bar = tuple[str, float, float, float]
_WIDTH = 40


def bars(blocks: Sequence[Bar]) -> list[str]:
    """One line a block: ``#`` spent, ``+`` reserved, ``.`` left. A bar is (name, spent, reserved, cap), in epsilon."""
    width = max((len(name) for name, *_ in blocks), default=0)
    lines = []
    for name, spent, reserved, cap in blocks:
        # Rounded up: what is spent is never invisible.
        full = min(_WIDTH, math.ceil(_WIDTH * spent / cap))
        held = min(_WIDTH - full, math.ceil(_WIDTH * reserved / cap))
        bar = "#" * full + "+" * held + "." * (_WIDTH - full - held)
        lines.append(f"{name:<{width}}  [{bar}] {spent + reserved:.3f} of {cap:g}")
    return lines


def svg(title: str, blocks: Sequence[Bar]) -> str:
    """The same as SVG text."""
    left, wide, tall, gap = 190, 420, 22, 12
    rows = []
    for i, (name, spent, reserved, cap) in enumerate(blocks):
        y = 56 + i * (tall + gap)
        a = min(1.0, spent / cap) * wide
        b = min(1.0, (spent + reserved) / cap) * wide
        rows.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{wide}" height="{tall}" fill="#e8edf2"/>'
            f'<rect x="{left}" y="{y}" width="{b:.1f}" height="{tall}" fill="#f2b84b"/>'
            f'<rect x="{left}" y="{y}" width="{a:.1f}" height="{tall}" fill="#2f6690"/>'
            f'<text x="{left + wide + 8}" y="{y + 15}">{spent + reserved:.3f} of {cap:g}</text>'
        )
    height = 72 + len(blocks) * (tall + gap) + 24
    legend = height - 16
    key = "".join(
        f'<rect x="{left + x}" y="{legend - 11}" width="12" height="12" fill="{colour}"/>'
        f'<text x="{left + x + 18}" y="{legend}">{name}</text>'
        for x, colour, name in ((0, "#2f6690", "spent"), (90, "#f2b84b", "reserved"), (200, "#e8edf2", "left"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif" font-size="13">'
        f'<rect width="760" height="{height}" fill="white"/><text x="16" y="30" font-size="17">{escape(title)} (epsilon)</text>'
        f"{''.join(rows)}{key}</svg>\n"
    )

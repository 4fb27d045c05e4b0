"""Numbers for people. The first argument is followed by an unused one, as matplotlib's tick formatters have it."""

from __future__ import annotations

from collections.abc import Sequence


def whole(value: float, _: object = None) -> str:
    """1,200"""
    return f"{value:,.0f}"


def count(value: float, _: object = None) -> str:
    """950, 12.5k, 2.5M, 20B, 1.2T: tokens and parameters, as the field writes them"""
    return _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")))


def flop_count(value: float, _: object = None) -> str:
    """140P, 3Z: decimal prefixes, as FLOP counts are written"""
    return _scaled(value, ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")))


def byte_count(value: float, _: object = None) -> str:
    """950 B, 12.5 kB, 2.5 MB, 20 GB"""
    text = _scaled(value, ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")))
    return text if text.endswith("B") else f"{text} B"


def duration(seconds: float) -> str:
    """45s, 3m20s, 5h07m, 12d03h"""
    total = round(seconds)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if minutes < 1:
        return f"{total}s"
    if hours < 1:
        return f"{minutes}m{total % 60:02d}s"
    if days < 1:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), (1.0, ""))
    digits = value / size
    # Three digits; `g` alone would turn 999.7 into 1e+03.
    return (f"{digits:.3g}" if abs(digits) < 99.95 else f"{digits:.0f}") + unit

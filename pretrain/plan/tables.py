"""Tables for a terminal, and numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[str, str, str]
"""Name, value, remark."""


def grid(title: str, header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Columns of values, each aligned at its right end, below their headers."""
    all_rows = [(title, header), *rows]
    name_width = max(len(name) for name, _ in all_rows)
    width = 2 + max(len(value) for _, values in all_rows for value in values)
    return [
        f"{name:<{name_width}}{''.join(value.rjust(width) for value in values)}".rstrip() for name, values in all_rows
    ]


def align(rows: Sequence[Row]) -> list[str]:
    """Two-space indent, names padded to one width, values of three columns padded to another."""
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max((len(value) for _, value, remark in rows if remark), default=0)
    lines = []
    for name, value, remark in rows:
        head = f"  {name:<{name_width}}  " if name_width else "  "
        lines.append(f"{head}{value:<{value_width}}  {remark}".rstrip())
    return lines


def quantity(value: float) -> str:
    """A count with four significant digits from a million on: `2.563 B`, `449.5 M`, `1,024`."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{_four_digits(value / size)} {unit}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def scientific(value: float) -> str:
    """A large number in powers of ten: `5.39e20`."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def binary_bytes(value: float) -> str:
    """Bytes in the largest binary unit below them: `45.0 GiB`, `12.3 MiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def decimal_bytes(value: float) -> str:
    """Bytes in the largest decimal unit below them, as networks count: `54.7 GB`, `12.3 MB`."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _four_digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"

"""Rules for `[optim]`: keys that belong to another kind of optimizer, and keys that do not fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.optim import SECTIONS, OptimConfig

DEEPSEEK_V4_STEPS = 10
"""Newton-Schulz steps of that set: its last two are made to follow eight others."""


def optim_rules(optim: OptimConfig) -> Iterator[str]:
    """Every broken rule."""
    yield from _unread_keys(optim)
    for section in set(SECTIONS[optim.kind]) & {"muon", "scion"}:
        table = getattr(optim, section)
        steps = table.newton_schulz_steps
        if table.newton_schulz_coefficients == "deepseek_v4" and steps < DEEPSEEK_V4_STEPS:
            yield (
                f"optim.{section}.newton_schulz_steps = {steps}: "
                f'newton_schulz_coefficients = "deepseek_v4" needs {DEEPSEEK_V4_STEPS} or more; raise it, or choose '
                '"polar_express"'
            )


def _unread_keys(optim: OptimConfig) -> Iterator[str]:
    """Keys that were given and that this kind of optimizer does not read."""
    for section, keys in optim.unread().items():
        table = getattr(optim, section) if section else optim
        for key in sorted(keys & table.model_fields_set):
            name = f"optim.{section}.{key}" if section else f"optim.{key}"
            readers = [f'"{kind}"' for kind, sections in SECTIONS.items() if key in sections]
            shown = "" if readers else f" = {getattr(table, key)}"
            instead = f", or set optim.kind = {' or '.join(readers)}" if readers else ""
            yield f'{name}{shown}: optim.kind = "{optim.kind}" does not read it; leave it out{instead}'

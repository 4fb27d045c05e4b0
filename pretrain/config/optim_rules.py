"""Rules for `[optim]`: keys that belong to another kind of optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.optim import SECTIONS, OptimConfig


def optim_rules(optim: OptimConfig) -> Iterator[str]:
    """Every key that was given and that this kind of optimizer does not read."""
    for section, keys in optim.unread().items():
        table = getattr(optim, section) if section else optim
        for key in sorted(keys & table.model_fields_set):
            name = f"optim.{section}.{key}" if section else f"optim.{key}"
            readers = [f'"{kind}"' for kind, sections in SECTIONS.items() if key in sections]
            shown = "" if readers else f" = {getattr(table, key)}"
            instead = f", or set optim.kind = {' or '.join(readers)}" if readers else ""
            yield f'{name}{shown}: optim.kind = "{optim.kind}" does not read it; leave it out{instead}'

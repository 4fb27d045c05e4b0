"""Which site trains which expert: a static map, the same in every layer and for every layout.

Expert e is trained by site e mod N. megatron-core gives every expert-parallel rank a run of consecutive experts, so
each rank holds as many trained ones as any other whenever N divides the experts of a rank; a map by runs would put all
of a site's optimizer state on a few of its ranks.
"""

from __future__ import annotations

from collections.abc import Collection

from pretrain.config.schema import Config


def owner_of(expert: int, sites: int, dropped: Collection[int] = ()) -> int:
    """The site that trains an expert. Experts of `dropped` sites are dealt to the remaining ones in turn."""
    site = expert % sites
    if site not in dropped:
        return site
    survivors = [other for other in range(sites) if other not in dropped]
    return survivors[expert // sites % len(survivors)]


def owned_experts(num_experts: int, sites: int, site: int, dropped: Collection[int] = ()) -> tuple[int, ...]:
    """The experts, out of `num_experts` in each layer, that a site trains."""
    return tuple(expert for expert in range(num_experts) if owner_of(expert, sites, dropped) == site)


def trained_experts(config: Config, dropped: Collection[int] = ()) -> tuple[int, ...] | None:
    """The experts that this run's site trains; None for all of them, as without [decentral]."""
    decentral = config.decentral
    if decentral is None or decentral.kind == "diloco" or decentral.sites == 1 or not config.model.is_moe:
        return None
    return owned_experts(config.model.num_experts, decentral.sites, decentral.site, dropped)

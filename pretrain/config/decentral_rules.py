"""Rules for `[decentral]`: what sites that train together need of the run, of the model and of each other."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterator

from pretrain.config.decentral import DecentralConfig
from pretrain.config.schema import Config


def decentral_rules(config: Config) -> Iterator[str]:
    """Every broken rule."""
    decentral = config.decentral
    if decentral is None:
        return
    if config.growth:
        yield "[[growth]]: a model that sites train together cannot grow yet; leave out [[growth]] or [decentral]"
    if decentral.site >= decentral.sites:
        yield (
            f"decentral.site = {decentral.site}: must be less than decentral.sites = {decentral.sites}, as sites "
            f"count from 0; use 0 to {decentral.sites - 1}"
        )
    if decentral.kind == "spes":
        yield from _ownership_rules(config, decentral)
    else:
        yield from _whole_replica_rules(decentral)
    if decentral.merge.coefficient:
        yield from _merge_rules(config, decentral)
    if decentral.outer_rule == "average":
        yield from _average_rules(decentral)
    if decentral.expert_delay_steps >= decentral.sync_every_steps:
        yield (
            f"decentral.expert_delay_steps = {decentral.expert_delay_steps}: must be less than "
            f"decentral.sync_every_steps = {decentral.sync_every_steps}, as the next round sends them anew; lower it"
        )
    yield from _member_rules(decentral)
    yield from _address_rules(decentral)


def _ownership_rules(config: Config, decentral: DecentralConfig) -> Iterator[str]:
    """What a site that trains a part of the experts needs."""
    model, parallel, N = config.model, config.parallel, decentral.sites
    if not model.is_moe:
        yield (
            'decentral.kind = "spes": a dense model (model.num_experts = 0) has no experts to share out; use '
            'decentral.kind = "diloco", or set model.num_experts'
        )
        return
    if N == 1:
        return
    local = model.num_experts // parallel.expert
    if model.num_experts % parallel.expert == 0 and local % N:
        fitting = [size for size in range(1, parallel.expert) if model.num_experts % (size * N) == 0]
        more = N * parallel.expert * math.ceil(model.num_experts / (N * parallel.expert))
        remedy = f"parallel.expert = {fitting[-1]}, " if fitting else ""
        yield (
            f"decentral.sites = {N}: must divide the experts of each rank, model.num_experts / parallel.expert = "
            f"{model.num_experts} / {parallel.expert}, so that every rank trains as many; use {remedy}decentral.sites "
            f"= {next(n for n in range(N, 0, -1) if local % n == 0)} or model.num_experts = {more}"
        )
    why = "Transformer Engine's grouped linears train all of a rank's experts or none"
    if model.backend == "transformer_engine":
        yield f'model.backend = "transformer_engine": with decentral.kind = "spes" it cannot be, as {why}; use "native"'
    if parallel.context > 1:
        yield (
            f'parallel.context = {parallel.context}: needs Transformer Engine, which decentral.kind = "spes" cannot '
            f"use, as {why}; set parallel.context = 1"
        )


def _whole_replica_rules(decentral: DecentralConfig) -> Iterator[str]:
    """Keys about the owners of experts, where every site trains all of them."""
    asked = {
        "merge.coefficient": decentral.merge.coefficient,
        "expert_delay_steps": decentral.expert_delay_steps,
        "reown_after_rounds": decentral.reown_after_rounds,
    }
    for key, value in asked.items():
        if value:
            yield (
                f'decentral.{key} = {value}: with decentral.kind = "diloco" experts have no owners, they are averaged '
                'as all else; leave it out, or use decentral.kind = "spes"'
            )


def _merge_rules(config: Config, decentral: DecentralConfig) -> Iterator[str]:
    merge, H, E = decentral.merge, decentral.sync_every_steps, config.model.num_experts
    if merge.every_steps % H:
        yield (
            f"decentral.merge.every_steps = {merge.every_steps}: must be a multiple of decentral.sync_every_steps = "
            f"{H}, as a merge follows a round; use {H * math.ceil(merge.every_steps / H)}"
        )
    if merge.every_steps >= merge.until_step:
        yield (
            f"decentral.merge.until_step = {merge.until_step}: must be more than decentral.merge.every_steps = "
            f"{merge.every_steps}, or merging ends before it begins; raise it, or set decentral.merge.coefficient = 0"
        )
    if config.model.is_moe and merge.neighbours >= E:
        yield (
            f"decentral.merge.neighbours = {merge.neighbours}: must be less than model.num_experts = {E}, as no "
            f"expert is its own neighbour; use {E - 1} or less"
        )


def _average_rules(decentral: DecentralConfig) -> Iterator[str]:
    """Keys of the outer optimizer, where there is none."""
    for key in ("outer_lr", "outer_momentum"):
        value = getattr(decentral, key)
        if value != DecentralConfig.model_fields[key].default:
            yield (
                f'decentral.{key} = {value}: only decentral.outer = "nesterov" reads it, and here it is "average"; '
                "leave it out, or set decentral.outer"
            )


def _member_rules(decentral: DecentralConfig) -> Iterator[str]:
    """How many sites a round may do without."""
    fewest, N = decentral.min_sites, decentral.sites
    majority = N // 2 + 1
    if fewest > N:
        yield (
            f"decentral.min_sites = {fewest}: must be at most decentral.sites = {N}; use {majority} to {N}, or 0 for "
            "more than half"
        )
    elif fewest and fewest < majority:
        yield (
            f"decentral.min_sites = {fewest}: must be more than half of decentral.sites = {N}, or the sites could part "
            f"and train on as two runs; use {majority} to {N}, or 0"
        )
    if decentral.transport != "fixed":
        return
    if fewest and majority <= fewest < N:
        yield (
            f'decentral.min_sites = {fewest}: decentral.transport = "fixed" needs all {N} sites; leave it out, or use '
            '"torchft"'
        )
    if decentral.reown_after_rounds:
        yield (
            f"decentral.reown_after_rounds = {decentral.reown_after_rounds}: with decentral.transport = "
            '"fixed" no site can miss a round; leave it out, or use "torchft"'
        )


def _address_rules(decentral: DecentralConfig) -> Iterator[str]:
    host, colon, port = decentral.coordinator.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        yield (
            f'decentral.coordinator = "{decentral.coordinator}": must be HOST:PORT; for example '
            '"127.0.0.1:29400" for sites on one machine'
        )
    elif not is_loopback(host) and is_loopback(decentral.bind):
        yield (
            f'decentral.bind = "{decentral.bind}": sites that meet at decentral.coordinator = '
            f'"{decentral.coordinator}" cannot reach this address; set decentral.bind to the address of this machine '
            "in the sites' network, which should be a private one"
        )
    if not decentral.bind or _is_every_address(decentral.bind):
        yield (
            f'decentral.bind = "{decentral.bind}": must be one address of this machine, which other sites are told; '
            "give that, or leave it out for sites on one machine"
        )


def is_loopback(host: str) -> bool:
    """Whether an address, or a name without looking it up, leads back to the same machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_every_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False

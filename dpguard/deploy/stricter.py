"""A site's own table beside the server's: column by column the stricter of the two, or a refusal."""

from __future__ import annotations

from dataclasses import replace

from dpguard.deploy.checks import Refused
from dpguard.policy.table import Plan, Rule


def stricter(server: Plan, site: Plan) -> Plan:
    """What is left when both tables must hold.

    A tensor is trained and shared only where both say so; the smaller clip, the larger noise multiplier, the larger
    absolute noise, the smaller share of entries and the fewer bits count. The result is never laxer than the server's
    table, which was rehearsed, nor than the site's.

    Args:
        server: the exported table.
        site: the site's, resolved against the same model.

    Returns:
        The merged plan; the server's own where the site's asks for nothing more.

    Raises:
        Refused: other tensors, other clip groups, or two treatments that have no order (unit, mode, adaptive clips,
            ways of pruning, registered operations).
    """
    if set(server) != set(site):
        raise Refused("the site's table was made for another model; expected the same tensors")
    _check_groups(server, site)
    rules = {name: _rule(rule, site[name]) for name, rule in server.items()}
    merged = replace(server, rules=rules)
    return server if merged.hash == server.hash else merged


def _check_groups(server: Plan, site: Plan) -> None:
    """Clips of different groups have no order, unless one side does not clip at all.

    Only tensors that both train count: what one side freezes leaves its group, and the rest under the smaller of both
    clips moves no further than either table lets it.
    """
    both = set(server.trained) & set(site.trained)
    mine, theirs = _groups(site, both), _groups(server, both)
    if mine and theirs and not mine <= theirs:
        raise Refused(
            "the site's table clips other groups of tensors than the server's; expected the same groups (the same rows "
            "and 'per'), or no clip in one of them"
        )


def _groups(plan: Plan, among: set[str]) -> set[frozenset[str]]:
    return {frozenset(group.names) & among for group in plan.groups.values()} - {frozenset()}


def _rule(server: Rule, site: Rule) -> Rule:
    name = server.slot.name
    both = server.clip is not None and site.clip is not None
    for column, matters in (
        ("unit", both),
        ("mode", both),
        ("quantile", both or site.quantile is not None),
        ("prune", server.keep < 1 and site.keep < 1),
        ("release", bool(site.release)),
    ):
        if matters and getattr(server, column) != getattr(site, column):
            raise Refused(
                f"the site asks for {column} {getattr(site, column)!r} of {name!r} and the server for "
                f"{getattr(server, column)!r}; expected the same, because neither is the stricter"
            )
    if (server.noise and site.noise_std) or (site.noise and server.noise_std):
        raise Refused(
            f"one table asks for noise and the other for noise_std of {name!r}; expected the same kind, because "
            "neither is the stricter"
        )
    clipped = site if server.clip is None else server
    clips = [rule.clip for rule in (server, site) if rule.clip is not None]
    bits = [rule.bits for rule in (server, site) if rule.bits is not None]
    return replace(
        server,
        train=server.train and site.train,
        share=server.share and site.share,
        clip=min(clips) if clips else None,
        group=clipped.group,
        mode=clipped.mode,
        unit=clipped.unit,
        noise=max(server.noise, site.noise),
        noise_std=max(server.noise_std, site.noise_std),
        keep=min(server.keep, site.keep),
        prune=(site if server.keep == 1 else server).prune,
        bits=min(bits) if bits else None,
        release=server.release or site.release,
        quantile=clipped.quantile,
    )

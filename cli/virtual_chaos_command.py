"""The words of ``python -m simulation chaos``, which are those of `baton chaos`. Breaks nothing itself."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TypeVar, get_args

from chaos import virtual_run
from chaos.schedule import FAULT_KINDS, USERS, Lengths
from chaos.virtual_run import ChaosOptions
from simulation import many
from simulation.cluster import Topology
from simulation.faults import Role

Word = TypeVar("Word", bound=str)
ROLES: tuple[Role, ...] = get_args(Role)


def main(arguments: list[str]) -> int:
    """0 when nobody noticed anything and every invariant held, 1 otherwise, 2 for words it does not know."""
    parser = argparse.ArgumentParser(prog="python -m simulation chaos", description=virtual_run.__doc__)
    parser.add_argument("--prefill", type=int, default=1, metavar="N")
    parser.add_argument("--decode", type=int, default=2, metavar="M")
    parser.add_argument("--front-proxies", type=int, default=2, metavar="F")
    parser.add_argument("--schedulers", type=int, default=1, metavar="S", help="as --set launcher.schedulers=S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many seeds, from --seed on")
    parser.add_argument("--faults", default="kill", metavar="KINDS", help=f"of {','.join(FAULT_KINDS)}, or all")
    parser.add_argument("--roles", default=",".join(ROLES), metavar="ROLES", help="whom it hits")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--users", type=int, default=USERS)
    for name, default in zip(Lengths.__struct_fields__, Lengths.__struct_defaults__, strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, metavar="N")
    parser.add_argument("--story", action="store_true", help="tell all that happened")
    words = parser.parse_args(arguments)
    kinds = _chosen("--faults", words.faults if words.faults != "all" else ",".join(FAULT_KINDS), FAULT_KINDS)
    roles = _chosen("--roles", words.roles, ROLES)
    if kinds is None or roles is None:
        return 2
    options = ChaosOptions(
        topology=Topology(
            prefill=words.prefill,
            decode=words.decode,
            front_proxies=words.front_proxies,
            schedulers=words.schedulers,
        ),
        kinds=kinds,
        roles=roles,
        rounds=words.rounds,
        users=words.users,
        lengths=Lengths(**{name: getattr(words, name) for name in Lengths.__struct_fields__}),
    )
    if words.seeds == 1:
        return _one(words.seed, options, story=words.story)
    seeds = range(words.seed, words.seed + words.seeds)
    requests = faults = repeated = 0
    for verdict in many.over(functools.partial(virtual_run.run, options=options), seeds):
        if not verdict.passed:
            return _one(verdict.seed, options, story=words.story)
        requests += verdict.counts.requests
        repeated += verdict.counts.repeated
        faults += verdict.faults
    print(f"{words.seeds} seeds passed: {faults} faults, {requests} requests, {repeated} repeated by their client")
    return 0


def _one(seed: int, options: ChaosOptions, *, story: bool) -> int:
    verdict = virtual_run.run(seed, options, telling=story)
    print("\n".join((*verdict.story, *virtual_run.told(verdict, virtual_run.planned(seed, options)))))
    return 0 if verdict.passed else 1


def _chosen(flag: str, words: str, known: tuple[Word, ...]) -> tuple[Word, ...] | None:
    chosen = {word.strip() for word in words.split(",") if word.strip()}
    unknown = sorted(chosen - set(known))
    if unknown or not chosen:
        print(f"error: {flag}: {', '.join(unknown) or 'nothing'} is not one of {', '.join(known)}", file=sys.stderr)
        return None
    return tuple(word for word in known if word in chosen)

"""Policies that know no prefixes: round robin, least load, power of two."""

from __future__ import annotations

import operator

from bench.policies.seen import PeerPolicy, Seen, least
from scheduler.api.chance import Random
from simulation.replay.policy import Request

_IN_FLIGHT = operator.attrgetter("requests")


class RoundRobin(PeerPolicy):
    """Each side in turn: the default of vLLM production-stack, and of Dynamo's ``--router-mode round-robin``."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._turn = 0

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """The next one."""
        return self.prefills[self._turn % len(self.prefills)]

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """The next one."""
        self._turn += 1
        return self.decodes[self._turn % len(self.decodes)]


class LeastLoad(PeerPolicy):
    """Fewest requests in flight on each side.

    Dynamo's ``--router-mode least-loaded`` and AIBrix's ``least-request`` (ai-dynamo/dynamo
    docs/components/router/router-concepts.md; vllm-project/aibrix pkg/plugins/gateway/algorithms/least_request.go).
    """

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """Fewest prompts that have no first token yet."""
        return least(self.prefills, _IN_FLIGHT, self.rng)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """Fewest requests that have not ended."""
        return least(self.decodes, _IN_FLIGHT, self.rng)


class PowerOfTwo(PeerPolicy):
    """The less loaded of two that chance draws (Mitzenmacher, IEEE TPDS 2001).

    SGLang's and vllm-project/router's ``power_of_two``; load is the number of requests in flight.
    """

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """The less loaded of two."""
        return less_loaded_of_two(self.prefills, self.rng)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """The less loaded of two."""
        return less_loaded_of_two(self.decodes, self.rng)


def less_loaded_of_two(workers: list[Seen], rng: Random) -> Seen:
    """Two different workers by chance; the one with fewer requests in flight."""
    if len(workers) == 1:
        return workers[0]
    first = int(rng.random() * len(workers))
    second = (first + 1 + int(rng.random() * (len(workers) - 1))) % len(workers)
    return min(workers[first], workers[second], key=_IN_FLIGHT)

"""Where does it run? Decides the workers of each request; never sees a token, a text or a KV byte.

``core.SchedulerCore`` is pure: events in, actions out, time and randomness as arguments. ``service`` is the only file
that knows grpc. A front proxy that lost its scheduler runs the same core over its last cluster view.

One plan: filters drop the workers that cannot serve (``policies/``), scorers rate the rest in [0, 1], a picker takes
one (``profile``). Prefill and decode are chosen together (``placement``), and the decode blocks are reserved before any
prefill is spent. ``disaggregation`` says whether a remote prefill pays.

What fits nowhere waits in a bounded queue (``queueing``), or is refused with a time to retry after.

Absent on purpose: prefix-aware routing. A scorer for it is one more file in ``policies/``.
"""

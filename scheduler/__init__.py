"""Which workers serve each request? Never sees a token, a text or a KV byte.

``core.SchedulerCore`` is pure: events in, actions out, time and randomness as arguments. ``shell`` performs its
actions, and ``service`` is the only file that knows grpc. A front proxy that lost its scheduler runs the same core over
its last cluster view.
"""

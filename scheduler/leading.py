"""Standing by, leading, and the end of it: in which order the lease is asked. ``leadership`` has the rules."""

from __future__ import annotations

import asyncio

import structlog

from runtime.clock import Clock
from runtime.silence import look_interval_s
from scheduler.config import SchedulerConfig
from scheduler.leadership import LeaderLease, Reachability
from scheduler.shell import SchedulerShell

log = structlog.get_logger(__name__)

# What a store raises where it is not there at all, or not for us.
_MISSING = (FileNotFoundError, PermissionError)


async def stand_by(config: SchedulerConfig, lease: LeaderLease, shell: SchedulerShell, address: str) -> int:
    """Wait until nobody else leads; the epoch of this leader.

    Raises what ``_MISSING`` names at the first try: then the store is not away but wrong, and only people can mend it.
    """
    epoch = await acquired(lease, shell, address, fatal=_MISSING)
    told = shell.standby_demand.count
    while epoch is None:
        if told != shell.standby_demand.count:
            told = shell.standby_demand.count
            await _tell_asked(lease)
        await asyncio.sleep(config.leader_interval_s)
        epoch = await acquired(lease, shell, address)
    return epoch


async def lead(config: SchedulerConfig, lease: LeaderLease, shell: SchedulerShell, clock: Clock) -> str:
    """Renew until leading is over: why it is. From then on this process must not plan any more."""
    reachability = Reachability()
    questions = _Questions(lease)
    look_s = _look_s(config)
    looked_s, heard = clock.monotonic_s(), shell.heard
    while True:
        await asyncio.sleep(config.leader_interval_s)
        try:
            held = await lease.renew()
        except OSError as error:
            log.warning("the store of the leader's lease is away", why=str(error))
            held = not shell.deposed
        shell.leads_until_s = lease.until_s if held else float("-inf")
        if not held:
            return "the lease is lost"
        if not config.deaf_step_down_s or clock.monotonic_s() < looked_s + look_s:
            continue
        hears = shell.heard != heard
        looked_s, heard = clock.monotonic_s(), shell.heard
        if reachability.look(hears=hears, other_asked=not hears and await questions.other_asked()):
            return "nobody is heard, and the one that stands by is asked"


async def acquired(
    lease: LeaderLease, shell: SchedulerShell, address: str, *, fatal: tuple[type[OSError], ...] = ()
) -> int | None:
    """The epoch of this leader; None where another one leads, or where the store is away or its disk full."""
    epoch = None
    try:
        epoch = await lease.try_acquire(address)
    except fatal:
        raise
    except OSError as error:
        log.warning("the store of the leader's lease is away", why=str(error))
    shell.stands_by_for = lease.leader.address if lease.sees_leader else ""
    return epoch


def demand_persists(config: SchedulerConfig, shell: SchedulerShell, now_s: float) -> bool:
    """Whether others were looking for the leader for as long as one that nobody reaches leads on at least.

    Then some may still be at its address, where they wait for an answer.
    """
    return shell.standby_demand.for_s(now_s) >= _look_s(config)


def _look_s(config: SchedulerConfig) -> float:
    return look_interval_s(config.deaf_step_down_s, config.heartbeat_interval_s)


async def _tell_asked(lease: LeaderLease) -> None:
    try:
        await lease.tell_asked()
    except OSError as error:
        log.warning("the leader cannot be told that somebody asks here", why=str(error))


class _Questions:
    """Whether the one that stands by is asked, by the store. Logs when that begins to fail and when it is over."""

    def __init__(self, lease: LeaderLease) -> None:
        self._lease = lease
        self._failing = False

    async def other_asked(self) -> bool:
        """Whether it was asked since the last look; not, as far as is known, where the store does not tell."""
        try:
            asked = await self._lease.other_asked()
        except OSError as error:
            if not self._failing:
                log.warning(
                    "the store does not tell whether the one that stands by is asked: this leader does not make way",
                    why=str(error),
                )
            self._failing = True
            return False
        if self._failing:
            log.warning("the store tells again whether the one that stands by is asked")
        self._failing = False
        return asked

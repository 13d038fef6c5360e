"""What of keys and accounts goes over the front proxy's stream to the scheduler. Holds timers; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec
import structlog

from accounts.account import Standing
from accounts.config import LIMITS, AccountsConfig, AccountsLimits
from accounts.usage import UsageRecord
from front_proxy.dispatch import wire
from front_proxy.dispatch.metrics import MESSAGES_UNREAD
from front_proxy.planning.key_watch import KeyWatch
from front_proxy.request.bill import Part
from protos.scheduler.v1 import scheduler_pb2

log = structlog.get_logger(__name__)

_OFF = AccountsConfig()
_pack = msgspec.msgpack.Encoder().encode
_standing = msgspec.msgpack.Decoder(Standing).decode
RECORDS_SENT_MAX = 128
"""Records of one message: a long list is told piece by piece after an outage."""


class AccountsLink:
    """``send`` is set by the link that holds the stream; it says whether a scheduler is there that answers."""

    def __init__(self, keys: KeyWatch | None, accounts: AccountsConfig = _OFF, limits: AccountsLimits = LIMITS) -> None:
        """``keys``: None where none are required."""
        self._accounts = accounts
        # Parts that asked for a plan, by its id; and all that may hold something, by request and number.
        self._asked: dict[int, Part] = {}
        self._open: dict[bytes, dict[int, Part]] = {}
        self._behind = True
        """Something was not sent."""
        self.send: Callable[[scheduler_pb2.FrontUpdates], bool] = lambda _message: False
        self.on_keys: Callable[[], object] = lambda: None
        """Called when the table of keys may be used, or is another one."""
        self._keys = keys
        self._limits = limits
        # Of requests that are over, the oldest first; and those of them that were not sent yet.
        self._unbooked: dict[bytes, UsageRecord] = {}
        self._unsent: list[UsageRecord] = []
        self._unsent_since_s = 0.0
        self._unsent_timer: asyncio.TimerHandle | None = None
        # Nothing waits for a scheduler that could book it.
        self._settled = asyncio.Event()
        self._settled.set()
        self._loop = asyncio.get_running_loop()
        self._keys_timer: asyncio.TimerHandle | None = None

    @property
    def knows_keys(self) -> bool:
        """Whether requests may be let in."""
        return self._keys is None or self._keys.good(self._loop.time())

    def begin(self) -> None:
        """The scheduler speaks, for the first time on this stream or again."""
        if self._behind:
            # In this order: what is not in the list is over, or told before it.
            self._behind = False
            self._unsent = list(self._unbooked.values())
            if self._unsent:
                self._settled.clear()
            self.flush()
            self._tell_open()
        if self._keys is not None:
            self._ask_keys(self._keys)

    def record(self, record: UsageRecord) -> None:
        """Tell the scheduler of a request that is over, until it says that it is booked."""
        if len(self._unbooked) >= self._limits.records_max:
            oldest = next(iter(self._unbooked))
            del self._unbooked[oldest]
            log.error("a usage record is lost: too many wait for the scheduler", uid=oldest.hex())
        self._unbooked[record.uid] = record
        self._open.pop(record.uid, None)
        if not self._behind:
            self._settled.clear()
            if not self._unsent:
                self._unsent_since_s = self._loop.time()
                if self._unsent_timer is None:
                    self._unsent_timer = self._loop.call_later(self._limits.tell_within_s, self._tell_unsent)
            self._unsent.append(record)

    def tell_with(self, question: scheduler_pb2.PlanRequest) -> None:
        """Tell the records that wait with a question, which may ask for what they free."""
        if len(self._unsent) > RECORDS_SENT_MAX:
            self.flush()
        # One that is asked again, on another stream, has those that were there before.
        question.records = self._packed() if self._unsent else b""

    def flush(self) -> None:
        """Tell the records that wait, without a question."""
        while self._unsent:
            self._tell(wire.usage(self._packed()))

    def _tell_unsent(self) -> None:
        self._unsent_timer = None
        left_s = self._unsent_since_s + self._limits.tell_within_s - self._loop.time()
        if self._unsent and left_s > 0:
            # Those for which the timer was set went with a question.
            self._unsent_timer = self._loop.call_later(left_s, self._tell_unsent)
        else:
            self.flush()

    def _packed(self) -> bytes:
        told, self._unsent = self._unsent[:RECORDS_SENT_MAX], self._unsent[RECORDS_SENT_MAX:]
        return _pack(told)

    def lost(self) -> None:
        """The stream is over: what was sent may not have come."""
        self._behind = True
        self._unsent.clear()
        self._settled.set()

    def asked(self, plan_id: int, part: Part) -> None:
        """A plan is asked for: what it grants is the part's."""
        self._asked[plan_id] = part
        self._open.setdefault(part.bill.uid, {})[part.number] = part

    def forget(self, plan_id: int) -> None:
        """The plan is over, or not wanted any more."""
        self._asked.pop(plan_id, None)

    def extend(self, part: Part) -> None:
        """Ask for more output. While no scheduler answers it is granted here, or the output ends."""
        self.flush()
        if not self.send(wire.extend(part)):
            self.grant_away(part)

    def grant_away(self, part: Part) -> bool:
        """Grant more without the scheduler, which books it afterwards. False: that is not wanted."""
        if self._accounts.mode == "enforce" and self._accounts.when_away == "refuse":
            return False
        first = not part.granted
        part.grant(part.granted + self._accounts.slice_tokens)
        if first and not self._behind:
            # The scheduler is there and did not plan it: of a hold that it does not know it would grant no more.
            self._tell_open()
        return True

    async def booked(self, timeout_s: float) -> None:
        """Wait until every record is booked, while a scheduler is there for it."""
        if not self._settled.is_set():
            # That nothing runs any more has them written now.
            self._tell_open()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()

    @property
    def unbooked(self) -> int:
        """Records that the scheduler has not booked yet."""
        return len(self._unbooked)

    def holds_record(self, uid: bytes) -> bool:
        """Whether the record of this request is still to be booked."""
        return uid in self._unbooked

    def hear(self, kind: str | None, reply: scheduler_pb2.FrontReply) -> None:
        """What the scheduler says with a message of this kind; what is not about keys or accounts is left to others.

        What cannot be read changes nothing: the table of keys stays until it is too old.
        """
        try:
            match kind:
                case "plan":
                    plan = reply.plan
                    if (part := self._asked.pop(plan.plan_id, None)) is not None:
                        part.grant(plan.granted_tokens)
                        if rates := plan.rates:
                            part.bill.standing = _standing(rates)
                case "refused":
                    refused = reply.refused
                    if (part := self._asked.pop(refused.plan_id, None)) is not None and refused.rates:
                        part.bill.standing = _standing(refused.rates)
                case "extended":
                    more = reply.extended
                    if (part := self._open.get(more.uid, {}).get(more.part)) is not None:
                        part.answer(more.output_tokens, more.beyond_tokens)
                        part.on_change()
                case "booked":
                    for uid in reply.booked.uids:
                        self._unbooked.pop(uid, None)
                    if not self._unbooked:
                        self._settled.set()
                case "keys" if self._keys is not None:
                    told = reply.keys
                    if self._keys.hear(told.version, told.number, told.keys):
                        self._ask_keys(self._keys)
                    self.on_keys()
        except (ValueError, RecursionError) as error:
            MESSAGES_UNREAD.labels(kind).inc()
            log.error("the scheduler's message about accounts cannot be read", kind=kind, why=str(error))

    def close(self) -> None:
        """Nothing more is sent."""
        for timer in (self._keys_timer, self._unsent_timer):
            if timer is not None:
                timer.cancel()
        self._keys_timer = self._unsent_timer = None

    def _ask_keys(self, keys: KeyWatch) -> None:
        """Now, and again before the table is too old."""
        if self._keys_timer is not None:
            self._keys_timer.cancel()
        self._keys_timer = self._loop.call_later(keys.interval_s, self._ask_keys, keys)
        self.send(wire.keys_asked(*keys.ask(self._loop.time())))

    def _tell_open(self) -> None:
        """All that holds something here."""
        self.flush()
        if self._accounts.mode != "off":
            self._tell(wire.holds_open([part for parts in self._open.values() for part in parts.values()]))

    def _tell(self, message: scheduler_pb2.FrontUpdates) -> None:
        if not self.send(message):
            self._behind = True

"""One Attach stream to one worker incarnation: slots, submissions, releases. Never decides what a failure means."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import msgspec
import structlog

from front_proxy.config import FrontProxyLimits
from front_proxy.dispatch import wire
from front_proxy.dispatch.attempts import AttemptWords, Receiver
from front_proxy.dispatch.lease_renewer import LeaseRenewer
from front_proxy.request.work import Submission, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from protos.worker.v1 import worker_pb2, worker_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import Dial
from runtime.rpc.grpc_stream import grpc_dial
from runtime.rpc.send_queue import SendQueue, exchange
from scheduler.api.actions import Placement

log = structlog.get_logger(__name__)

SLOT_MAX = 2**32


OnWork = Callable[[bytes], None]
"""Gets what one submission cost, packed, once, when it is over or aborted; empty: its worker did not say."""


class _Queued(msgspec.Struct, frozen=True):
    slot: int
    submission: Submission
    queued_at_s: float


_Item = _Queued | worker_pb2.AttachRequests


class WorkerLink:
    """Submissions may be submitted before the stream is open; they wait for it, and fail with it."""

    def __init__(
        self,
        worker: Placement,
        *,
        front_proxy_id: str,
        engine_version: str,
        send_messages_max: int,
        limits: FrontProxyLimits,
        dial: Dial,
    ) -> None:
        self.worker = worker
        self.opened = False
        self.heard_s = float("-inf")
        """When the worker last said anything, on the loop's clock."""
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._dial = dial
        self._sending: SendQueue[_Item] = SendQueue(send_messages_max, self._encode, _weigh)
        self._slots: dict[int, Receiver] = {}
        # Those of which it matters what they cost, aborted ones included.
        self._costs: dict[int, OnWork] = {}
        self._leases: set[str] = set()
        self.next_slot = 1
        """Of the next submission."""
        self._opening = wire.opening(front_proxy_id, engine_version)

    @property
    def ended(self) -> bool:
        """Whether nothing can be submitted any more."""
        return self._sending.closed

    @property
    def idle(self) -> bool:
        """Whether ending the stream would break no request."""
        return not self._slots and not self._leases

    @property
    def leases_held(self) -> int:
        """Hand-offs received over this stream and not released over it."""
        return len(self._leases)

    def submit(self, submission: Submission, receiver: Receiver, on_work: OnWork | None = None) -> int:
        """Send a submission; returns its slot. A stream that is over is told through ``receiver`` at once."""
        slot = self._free_slot()
        self._slots[slot] = receiver
        if on_work is not None:
            self._costs[slot] = on_work
        if not self._sending.put(_Queued(slot, submission, self._loop.time())):
            del self._slots[slot]
            self._cost(slot, b"")
            receiver(self._lost("the stream is over"))
        return slot

    def abort(self, slot: int) -> None:
        """Stop what runs on ``slot``. A hand-off that was already on its way is released here."""
        if self._slots.pop(slot, None) is not None and not self._sending.put(wire.abort(slot)):
            self._cost(slot, b"")

    def release(self, handoff: KvHandoff, *, pulled: bool) -> bool:
        """Tell the worker. False when there is no stream: then the worker has released it already."""
        if handoff.lease_id not in self._leases:
            return False
        self._leases.discard(handoff.lease_id)
        return self._sending.put(wire.release(handoff, pulled=pulled), patient=True)

    def renew(self, handoff: KvHandoff) -> bool:
        """Ask the worker to hold it longer. False when it was released, or there is no stream."""
        return handoff.lease_id in self._leases and self._sending.put(wire.renew(handoff))

    def end(self, reason: str) -> None:
        """End the stream soon; what runs on it fails."""
        self._sending.close(Failure(kind=FailureKind.UNAVAILABLE, message=reason))

    async def run(self) -> str:
        """Hold the stream open until it ends; returns why."""
        reason = "the front proxy stops"
        try:
            ended = await exchange(
                self._dial,
                self.worker.address,
                self._sending,
                opening=self._opening,
                on_message=self._on_message,
                first_timeout_s=self._limits.connect_timeout_s,
            )
            reason = str(ended)
        finally:
            self._fail_all(reason)
        return reason

    def _fail_all(self, reason: str) -> None:
        # The worker aborts and releases everything of a stream that ended, so nothing is left to be told.
        self._leases.clear()
        for slot in list(self._costs):
            self._cost(slot, b"")
        slots, self._slots = self._slots, {}
        for receiver in slots.values():
            receiver(self._lost(reason))

    def _lost(self, reason: str) -> Failure:
        text = f"The stream to worker {self.worker.worker_id} broke: {reason}"
        return Failure(kind=FailureKind.UNAVAILABLE, message=text, reached=self.opened)

    def _free_slot(self) -> int:
        # Never the number of a slot that just ended: a delta still on its way must not reach the next submission.
        while self.next_slot in self._slots or self.next_slot in self._costs:
            self.next_slot = self.next_slot % (SLOT_MAX - 1) + 1
        slot = self.next_slot
        self.next_slot = slot % (SLOT_MAX - 1) + 1
        return slot

    def _encode(self, item: _Item) -> worker_pb2.AttachRequests | None:
        if not isinstance(item, _Queued):
            return item
        if item.slot not in self._slots:
            # Aborted before it left. The abort behind it in the queue is for a slot the worker never saw.
            self._cost(item.slot, b"")
            return None
        try:
            return wire.submit(item.slot, item.submission, self._loop.time() - item.queued_at_s)
        except (ValueError, TypeError, OverflowError) as error:
            # What validation let through must cost its own request only, not the stream that all share.
            log.exception("request cannot be put on the wire", request_id=item.submission.engine_request.request_id)
            text = f"The request cannot be sent to a worker: {type(error).__name__}."
            self._cost(item.slot, b"")
            self._slots.pop(item.slot)(Failure(kind=FailureKind.INTERNAL, message=text))
            return None

    def _on_message(self, message: worker_pb2.AttachResponse) -> None:
        if self._sending.closed:
            return  # a message was not understood, and after it the tokens of the next would be shown with a gap
        self.heard_s = self._loop.time()
        if message.HasField("step"):
            self._on_step(message.step)
        elif message.HasField("opened"):
            self.opened = True
            told = message.opened.worker
            if told.epoch != self.worker.epoch:
                self.end(f"it was started again (epoch {told.epoch}, not {self.worker.epoch})")

    def _on_step(self, step: worker_pb2.StepOutputs) -> None:
        try:
            parts = wire.token_parts(step)
        except ValueError as error:
            # The tokens cannot be matched to requests: all that runs here goes on elsewhere.
            self.end(f"its message makes no sense: {error}")
            return
        for slot, token_ids in parts:
            receiver = self._slots.get(slot)
            if type(receiver) is AttemptWords:
                receiver.tokens(token_ids)
            elif receiver is not None:
                receiver(WorkerOutput(token_ids=token_ids))
        for delta in step.deltas:
            self._on_delta(delta)

    def _on_delta(self, delta: worker_pb2.Delta) -> None:
        receiver = self._slots.get(delta.slot)
        word = wire.worker_word(delta)
        handoff = word.handoff if isinstance(word, WorkerOutput) else None
        if handoff is not None:
            self._leases.add(handoff.lease_id)
        if wire.ends_slot(delta):
            self._slots.pop(delta.slot, None)
            self._cost(delta.slot, delta.work)
        if receiver is not None:
            receiver(word)
        elif handoff is not None:
            self.release(handoff, pulled=False)

    def _cost(self, slot: int, work: bytes) -> None:
        if self._costs and (on_work := self._costs.pop(slot, None)) is not None:
            on_work(work)


def _weigh(item: _Item) -> int:
    return wire.size_estimate_bytes(item.submission) if isinstance(item, _Queued) else item.ByteSize()


class WorkerLinks:
    """All links of a front proxy, one per worker incarnation, dialled when first needed."""

    def __init__(
        self,
        *,
        front_proxy_id: str,
        engine_version: str,
        send_messages_max: int,
        limits: FrontProxyLimits,
        spawn: Callable[[WorkerLink], None],
        on_lost: Callable[[Placement, str], None],
        dial: Dial | None = None,
    ) -> None:
        self._link = functools.partial(
            WorkerLink,
            front_proxy_id=front_proxy_id,
            engine_version=engine_version,
            send_messages_max=send_messages_max,
            limits=limits,
            dial=dial
            or grpc_dial(
                lambda channel: worker_pb2_grpc.WorkerServiceStub(channel).Attach(),
                message_bytes_max=limits.message_bytes_max,
            ),
        )
        self._limits = limits
        self._spawn = spawn
        self._on_lost = on_lost
        self._links: dict[tuple[str, int], WorkerLink] = {}
        self._not_before_s: dict[tuple[str, int], float] = {}
        self._loop = asyncio.get_running_loop()
        self._keeper = LeaseRenewer(limits.handoff_renew_interval_s, self._renew)

    @property
    def leases_held(self) -> int:
        """Hand-offs received and not let go, over all workers."""
        return sum(link.leases_held for link in self._links.values())

    def submit(
        self, worker: Placement, submission: Submission, receiver: Receiver, on_work: OnWork | None = None
    ) -> int:
        """Send a submission to a worker, connecting first where needed; returns its slot there."""
        key = (worker.worker_id, worker.epoch)
        link = self._links.get(key)
        if link is None or link.ended:
            if self._loop.time() < self._not_before_s.get(key, 0.0):
                text = f"Worker {worker.worker_id} could not be reached a moment ago."
                if on_work is not None:
                    on_work(b"")
                receiver(Failure(kind=FailureKind.UNAVAILABLE, message=text, reached=False))
                return 0
            former, link = link, self._link(worker)
            if former is not None:
                # Count on, so that a late word about an old slot cannot hit a new one.
                link.next_slot = former.next_slot
            self._links[key] = link
            self._spawn(link)
        if submission.handoff is not None:
            self._keeper.keep(submission.handoff)
        return link.submit(submission, receiver, on_work)

    def abort(self, worker: Placement, slot: int) -> None:
        """Stop a submission's work."""
        link = self._links.get((worker.worker_id, worker.epoch))
        if link is not None:
            link.abort(slot)

    def release(self, handoff: KvHandoff, *, pulled: bool) -> bool:
        """Give a hand-off back to its holder. False where the holder knows already."""
        self._keeper.drop(handoff)
        link = self._links.get((handoff.worker_id, handoff.epoch))
        return link is not None and link.release(handoff, pulled=pulled)

    def _renew(self, handoff: KvHandoff) -> bool:
        link = self._links.get((handoff.worker_id, handoff.epoch))
        return link is not None and link.renew(handoff)

    def heard_s(self, worker: Placement) -> float:
        """When a worker last said anything here, on the loop's clock; minus infinity where there is no stream."""
        link = self._links.get((worker.worker_id, worker.epoch))
        return link.heard_s if link is not None else float("-inf")

    def forget(self, worker_id: str, epoch: int) -> None:
        """The scheduler does not know this incarnation any more: end its stream if nothing needs it."""
        self._not_before_s.pop((worker_id, epoch), None)
        link = self._links.get((worker_id, epoch))
        if link is not None and link.idle:
            link.end("the worker left the cluster")

    def end_all(self, reason: str) -> None:
        """End every stream."""
        self._keeper.close()
        for link in self._links.values():
            link.end(reason)

    async def run_link(self, link: WorkerLink) -> None:
        """Hold one link open to its end; what ``spawn`` starts."""
        key = (link.worker.worker_id, link.worker.epoch)
        try:
            reason = await link.run()
        finally:
            if self._links.get(key) is link:
                del self._links[key]
        if not link.opened:
            now_s = self._loop.time()
            # Drop every entry whose wait is over, so that this does not grow.
            self._not_before_s = {at: until for at, until in self._not_before_s.items() if until > now_s}
            self._not_before_s[key] = now_s + self._limits.worker_connect_retry_s
        log.info("stream to worker ended", worker_id=link.worker.worker_id, reason=reason)
        self._on_lost(link.worker, reason)

"""One test pull between two workers of a running cluster: a small prompt, handed from one to the other as any is.

So it goes over the engines' own NIXL agents and memory. It is of the batch class: a client's request is computed first.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec

from front_proxy.dispatch import wire
from launcher.hosted import status
from protos.cluster.v1 import cluster_pb2
from protos.worker.v1 import worker_pb2 as pb
from protos.worker.v1 import worker_pb2_grpc
from runtime.priority_class import engine_priority
from runtime.rpc.grpc_server import channel

BYTES_MAX = 16 << 20
"""Of KV, and one block at least."""
TOKENS_MAX = 2_048
"""The longest prompt that it has computed."""
TIMEOUT_S = 20.0
"""For the whole of one test pull."""
_LOOK_INTERVAL_S = 0.1
_MESSAGE_BYTES_MAX = 64 << 20
_TOKEN = 5
"""Every model has it."""
_SLOT = 1


class Pull(msgspec.Struct, frozen=True, kw_only=True):
    """What one pull was like. ``problem``: why there was none; the rest is then not known."""

    transports: tuple[str, ...] = ()
    kv_bytes: int = 0
    seconds: float = 0.0
    problem: str = ""


async def pull(prefill_address: str, decode_address: str) -> Pull:
    """Have the decode worker pull KV that the prefill worker computed. Takes ``TIMEOUT_S`` at most."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _pull(prefill_address, decode_address)
    except TimeoutError:
        return Pull(problem=f"there was no answer within {TIMEOUT_S:.0f} s")
    except ConnectionError as error:
        return Pull(problem=str(error))
    except grpc.aio.AioRpcError as error:
        return Pull(problem=error.details() or error.code().name)


async def _pull(prefill_address: str, decode_address: str) -> Pull:
    before = await status.ask(decode_address, timeout_s=TIMEOUT_S)
    if before is None:
        return Pull(problem=f"{decode_address} does not answer")
    name = f"doctor-{uuid.uuid4().hex}"
    async with _attached(prefill_address, name) as (prefill, info), _attached(decode_address, name) as (decode, _):
        submit = pb.Submit(
            slot=_SLOT,
            token_ids=[_TOKEN] * _prompt_tokens(info),
            sampling=msgspec.msgpack.encode({"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}),
            priority=engine_priority("batch", 0),
            # Nothing of it is in any cache, and none of it is of use to another request.
            cache_salt=name,
            deadline_ms=round(TIMEOUT_S * 1000),
        )
        submit.request_id = f"{name}-p"
        submit.prefill.SetInParent()
        held = await _last(prefill, submit)
        if not held.HasField("handoff"):
            return Pull(problem=f"no KV was offered: {held.failure.message or 'the prefill engine held none'}")
        submit.request_id = f"{name}-d"
        submit.decode.handoff.CopyFrom(held.handoff)
        taken = await _last(decode, submit)
        pulled = taken.first.external_tokens > 0
        release = pb.ReleaseHandoff(lease_id=held.handoff.lease_id, epoch=held.handoff.epoch, pulled=pulled)
        await prefill.write(pb.AttachRequests(messages=[pb.AttachRequest(release=release)]))
        if not pulled:
            return Pull(problem=taken.failure.message or "the KV was computed again: the decode worker's log says why")
        return await _measured(decode_address, before)


async def _measured(address: str, before: cluster_pb2.ProcessStatus) -> Pull:
    """The worker's own numbers, which come with the engine's next step. Other pulls may be among them."""
    while True:
        after = await status.ask(address, timeout_s=TIMEOUT_S)
        if after is not None and after.kv_bytes_in > before.kv_bytes_in:
            kv_bytes, pull_us = after.kv_bytes_in - before.kv_bytes_in, after.kv_pull_us - before.kv_pull_us
            return Pull(transports=tuple(after.kv_transports), kv_bytes=kv_bytes, seconds=pull_us / 1e6)
        await asyncio.sleep(_LOOK_INTERVAL_S)  # the worker is asked: it does not tell


def _prompt_tokens(info: cluster_pb2.WorkerInfo) -> int:
    """Whole blocks of ``BYTES_MAX`` together, in the model's context."""
    block_tokens = max(1, info.layout.block_size_tokens)
    blocks = BYTES_MAX // info.layout.block_bytes if info.layout.block_bytes else TOKENS_MAX
    tokens = min(TOKENS_MAX, max(1, blocks) * block_tokens, (info.context_tokens_max or TOKENS_MAX) - 2)
    return max(1, tokens)


@contextlib.asynccontextmanager
async def _attached(address: str, name: str) -> AsyncIterator[tuple[Any, cluster_pb2.WorkerInfo]]:
    """A stream as a front proxy has it. Its end releases all that is left."""
    async with channel(address, _MESSAGE_BYTES_MAX) as opened:
        call: Any = worker_pb2_grpc.WorkerServiceStub(opened).Attach()
        try:
            await call.write(wire.opening(name, ""))
            answer = await _read(call)
            yield call, answer.opened.worker
        finally:
            call.cancel()


async def _last(call: Any, submit: pb.Submit) -> pb.Delta:
    """What is last said of a submission; with what was said first of it."""
    await call.write(pb.AttachRequests(messages=[pb.AttachRequest(submit=submit)]))
    seen = pb.Delta()
    while not (seen.finish or seen.HasField("failure")):
        for delta in (await _read(call)).step.deltas:
            seen.MergeFrom(delta)
    return seen


async def _read(call: Any) -> pb.AttachResponse:
    answer = await call.read()
    if not isinstance(answer, pb.AttachResponse):
        raise ConnectionError("a worker ended the stream")
    return answer

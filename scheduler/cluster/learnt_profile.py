"""The latency profile of workers that serve: what their steps taught, as `baton profile` writes it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.cluster.latency_model import LearntSteps
from scheduler.cluster.latency_profile import Fingerprint, LatencyProfile
from scheduler.cluster.measurements import FitErrors, Learnt, LearntKind, LearntWorker, Measurements
from scheduler.cluster.step_law import StepLaw
from scheduler.cluster.worker import Worker

NOT_TOLD = (
    "hardware and flags: empty",
    "hand-offs: the link is the one that the scheduler began with, and so are the bytes of a token where none are told",
    "time to drain and to change the role",
    "max_num_seqs: the requests that a worker admits stand in its place",
    "GPUs of a worker: 1 is assumed",
    "of a worker with several data-parallel ranks: laws, KV and requests are of one rank",
    "chunk: the one that the scheduler began with, or the most prompt tokens that a step had, if these are more",
)
"""What steps do not show."""
REQUESTS_MAX = 256
"""Where workers admit any number."""


def profile_of(workers: Sequence[Worker], start: LatencyProfile) -> LatencyProfile | None:
    """Of the workers of one pool; None before a step of each kind taught it. ``start``: what was believed before."""
    shown = [worker for worker in workers if worker.latency.observed and worker.latency.learnt.decode_steps.seen]
    if not shown:
        return None
    learnt = shown[0].latency.learnt
    shown = [worker for worker in shown if worker.latency.learnt is learnt]
    # KV and requests bound what decodes. Steps are of one rank.
    info = next((worker for worker in shown if worker.role == "decode"), shown[0]).ranks[0].info
    prompts, decode = learnt.prompt_steps, learnt.decode_steps
    young = [name for name, kind in (("with prompts", prompts), ("of decode", decode)) if kind.young]
    block = info.block_size_tokens
    requests_max = info.requests_max or REQUESTS_MAX
    # What a step with a prompt costs beside its tokens, over one that only decodes.
    extra_s = max(0.0, prompts.law.fixed_s - decode.law.fixed_s)
    token_s = prompts.law.prefill_token_s
    return LatencyProfile(
        version=3,
        fingerprint=Fingerprint(engine=info.engine_version, model=info.model),
        step=StepLaw(
            fixed_s=decode.law.fixed_s,
            prefill_token_s=token_s,
            prefill_pair_s=prompts.law.prefill_pair_s,
            decode_request_s=decode.law.decode_request_s,
            decode_context_token_s=decode.law.decode_context_token_s,
        ),
        chunk_tokens=learnt.chunk_tokens,
        kv_bytes_per_token=info.block_bytes // block or start.kv_bytes_per_token,
        link=start.link,
        measured=Measurements(
            kv_blocks_total=info.kv_blocks_total,
            block_size_tokens=block,
            sequences_max=requests_max,
            requests_max=requests_max,
            start_s=info.start_s,
            prefill=(),
            decode=(),
            prefill_curve=tuple((tokens, extra_s + token_s * tokens) for tokens in (1, 1 + learnt.chunk_tokens)),
            errors=FitErrors(
                prefill_median=prompts.error,
                prefill_worst=prompts.error,
                decode_median=decode.error,
                decode_worst=decode.error,
                flagged=("errors are usual ones of late: single cells are not kept",),
            ),
            noise=min(1.0, decode.error),
            not_good=f"fewer steps {' and '.join(young)} than a law needs" if young else "",
        ),
        learnt=Learnt(
            prompt_steps=_kind(prompts),
            decode_steps=_kind(decode),
            workers=tuple(
                LearntWorker(
                    worker_id=each.worker_id, role=each.role, factor=each.latency.factor, error=each.latency.error
                )
                for each in shown
            ),
            not_told=NOT_TOLD,
        ),
    )


def _kind(steps: LearntSteps) -> LearntKind:
    return LearntKind(seen=steps.seen, error=steps.error, law=steps.law)

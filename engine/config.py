"""Settings of one engine. Holds values and their bounds; imports nothing heavy and starts nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from runtime.bounds import Count, Fraction, NonNegative, PositiveCount

# What vLLM's random generators take, numpy's among them.
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class FakeEngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fake engine's size, speed and faults. Times are of the running loop's clock, which may be virtual."""

    kv_blocks_total: PositiveCount = 4096
    block_bytes: PositiveCount = 65536
    vocab_size: PositiveCount = 512
    eos_token_id: int | None = None
    prefill_us_per_token: NonNegative = 50.0
    step_us: NonNegative = 0.0
    """Of every step, like the fixed part of a real engine's."""
    decode_step_us: NonNegative = 2000.0
    decode_step_us_per_request: NonNegative = 100.0
    pull_us_per_block: NonNegative = 20.0
    start_s: NonNegative = 0.0
    # Every n-th hand-off cannot be taken over (0: none), so that the engine computes the prompt again.
    pull_failure_every: Count = 0
    # The engine dies after this many requests (0: never).
    dies_after_requests: Count = 0
    # The engine stands still after this many requests, and answers nothing any more (0: never).
    hangs_after_requests: Count = 0


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What no operator needs to choose. NIXL's own options can be set by ``engine.args.kv_transfer_config``."""

    start_timeout_s: float = 1_800.0
    """How long an engine has to start. `baton up` waits for ``launcher.start_timeout_s`` at most."""

    lease_duration_s: float = 30.0
    """How long a prefill engine keeps KV that is not pulled and not released by message, where the request says
    nothing else."""
    pulled_release_delay_s: float = 1.0
    """How long after a reported pull the holder is told to free the KV; releases of that time go together. The
    transfer layer has told the holder already, unless the pull had failed unnoticed."""
    nixl_threads: int = 2
    nixl_progress_delay_us: int = 100
    """How long NIXL's progress thread waits between two looks; 0: it spins, which takes one core of an idle engine."""
    kv_proof_timeout_s: float = 2.0
    """How long a taker waits for a holder's reply before it computes the prompt itself."""
    kv_holder_connect_timeout_s: float = 2.0
    """How long a taker tries to reach a holder's address before the pull has failed, and the prompt is computed."""
    kv_events_kept_steps: int = 1_000
    """Steps whose KV events the engine can repeat: about 40 MB where each computes 8,000 tokens of a prompt."""
    kv_events_waiting_steps: int = 10_000
    """Steps whose KV events wait for a worker that stands still; with more they are lost, and hits with them."""
    ucx_tls: str = "tcp,cma,posix,sysv,self"
    """UCX's transports on CPU, where the environment has no UCX_TLS; elsewhere UCX chooses."""
    close_timeout_s: float = 10.0
    """How long vLLM's processes have to end when the engine is closed; then vLLM kills them."""
    close_grace_s: float = 5.0
    """How much longer closing may take in all, before it is given up."""


LIMITS = EngineLimits()


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator of vLLM chooses. The same for both roles, but for the sizes in ``launcher.engine``.

    A worker that changes its role keeps its engine.
    """

    kind: Literal["vllm", "fake"] = "vllm"
    """The fake engine needs no model and makes up its tokens: for tests and benchmarks."""
    model: str = ""
    """A folder, or a name that the model hub knows."""
    served_model_name: str = ""
    """The name clients use. Empty: the model's own."""
    tokenizer: str = ""
    """A folder or a name. Empty: the model's own."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    dtype: str = "auto"
    """Precision of weights and KV, as vLLM names it."""
    max_model_len: PositiveCount | None = None
    """Longest context in tokens. Unset: what the model says."""
    block_size_tokens: PositiveCount = 32
    """Tokens of one KV block. On CPU a multiple of 32; another one is refused before anything starts."""
    kv_cache_bytes: PositiveCount | None = None
    """Memory for KV. Unset: vLLM decides (GPU), or 1 GiB (CPU). Watch ``baton_worker_kv_blocks_used``."""
    enforce_eager: bool | None = None
    """Run the model as it is written, without compiling it at the start. Unset: on CPU, where compiling takes 25 s of
    CPU for each engine and a C++ compiler (docs/operations.md); elsewhere vLLM compiles it and captures graphs."""
    tensor_parallel_size: PositiveCount = 1
    """GPUs of one engine, or of each of its data-parallel ranks."""
    data_parallel_size: PositiveCount = 1
    """Ranks of one engine that serve different requests. With experts in parallel one worker is so many ranks."""
    enable_expert_parallel: bool = False
    """Spread the experts of an MoE model over all ranks of the engine, and let the scheduler place them
    (docs/experts.md)."""
    redundant_experts: Count = 0
    """Slots for further copies of experts, in each layer and over all ranks. Watch `baton experts advise`."""
    max_num_seqs: PositiveCount = 64
    """Sequences in one step. Watch ``baton_worker_queue_seconds``."""
    max_num_batched_tokens: PositiveCount | None = None
    """Prompt tokens of one step. Unset: vLLM's own default. Watch ``baton_worker_compute_seconds``."""
    seed: Seed = 0
    """Of sampling, where a request names none."""
    cpu_threads: Count = 0
    """CPU threads of one engine. 0: an even share of the cores among the engines of `baton up`; half of the cores for a
    worker that was started by hand."""
    kv_check_fraction: Fraction = 1.0
    """Share of hand-offs whose KV is checked by content after it was pulled: the holder computes a checksum of every
    block, the taker compares. The rest counts as right when the holder says that it held the KV until the pull ended.
    Less saves CPU. Watch ``baton_worker_pulls_wrong``."""
    transport_required: Literal["", "rdma"] = ""
    """``rdma``: KV is never pulled over TCP, which is taken out of UCX_TLS. A pull that has no other way fails, and its
    prompt is computed. Empty: what UCX chooses. Watch ``baton_worker_kv_transport_info``."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any further field of vLLM's AsyncEngineArgs, typed as `vllm serve` types it; front proxies read it too. One that
    is set above is refused before anything starts; one that vLLM does not know, or a value that it does not take, is
    named when engine or front proxy start. ``kv_transfer_config``, ``disable_log_stats``: see docs/operations.md."""
    fake: FakeEngineConfig = FakeEngineConfig()
    """Of the fake engine, for tests and benchmarks."""

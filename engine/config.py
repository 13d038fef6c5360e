"""Settings of one engine. Holds values and their bounds; imports nothing heavy and starts nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from runtime.bounds import Count, Fraction, NonNegative, Positive, PositiveCount

# What vLLM's random generators take, numpy's among them.
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class FakeEngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fake engine's size, speed and faults. Times are of the running loop's clock, which may be virtual."""

    kv_blocks_total: PositiveCount = 4096
    block_bytes: PositiveCount = 65536
    vocab_size: PositiveCount = 512
    eos_token_id: int | None = None
    prefill_us_per_token: NonNegative = 50.0
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


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of every engine of a cluster. They are the same for both roles, so that a worker can change its role."""

    kind: Literal["vllm", "fake"] = "vllm"
    # A folder, or a name that the model hub knows.
    model: str = ""
    # The name clients use; empty: the model's own.
    served_model_name: str = ""
    tokenizer: str = ""
    trust_remote_code: bool = False
    dtype: str = "auto"
    # None: what the model says.
    max_model_len: PositiveCount | None = None
    # On CPU a multiple of 32; another one is refused before anything starts.
    block_size_tokens: PositiveCount = 32
    # None: vLLM decides from memory (GPU) or 1 GiB (CPU).
    kv_cache_bytes: PositiveCount | None = None
    # Run the model as it is written, without compiling it at the start. None: on CPU, where compiling takes 25 s of CPU
    # for each engine and a C++ compiler (docs/operations.md); elsewhere vLLM compiles it and captures graphs.
    enforce_eager: bool | None = None
    tensor_parallel_size: PositiveCount = 1
    max_num_seqs: PositiveCount = 64
    # None: vLLM's own default.
    max_num_batched_tokens: PositiveCount | None = None
    seed: Seed = 0
    # CPU threads of one engine; 0: share the machine's cores evenly between the engines that engines_per_machine says.
    cpu_threads: Count = 0
    engines_per_machine: PositiveCount = 2
    # How long a prefill engine keeps KV that is not pulled and not released by message.
    lease_duration_s: Positive = 30.0
    # How long after a reported pull the holder is told to free the KV; releases of that time go together. The transfer
    # layer has told the holder already, unless the pull had failed unnoticed.
    pulled_release_delay_s: Positive = 1.0
    # Where this engine offers its NIXL metadata; other machines must reach it. The port is asked from the kernel.
    side_channel_host: str = "127.0.0.1"
    # The connector class and its module; "MultiConnector" with an empty module composes several (kv_connector_extra).
    kv_connector: str = "NixlConnector"
    kv_connector_module: str = "kv_transfer.nixl.connector"
    kv_connector_extra: dict[str, Any] = msgspec.field(default_factory=dict)
    nixl_backends: list[str] = msgspec.field(default_factory=lambda: ["UCX"])
    nixl_threads: PositiveCount = 2
    # How long NIXL's progress thread waits between two looks; 0: it spins, which takes one core of an idle engine.
    nixl_progress_delay_us: Count = 100
    # Share of hand-offs whose KV is checked by content after it was pulled: the holder computes a checksum of every
    # block, the taker compares. The rest counts as right when the holder says that it held the KV until the pull ended.
    kv_check_fraction: Fraction = 1.0
    # How long a taker waits for a holder's reply before it computes the prompt itself.
    kv_proof_timeout_s: Positive = 2.0
    # How long a taker tries to reach a holder's address before the pull has failed, and the prompt is computed again.
    kv_holder_connect_timeout_s: Positive = 2.0
    ucx_tls: str = "tcp,cma,posix,sysv,self"
    # Serve what vLLM's scheduler and connector count (vllm:*) from the worker's /metrics too. It costs CPU every step;
    # vllm:* histograms of single requests stay empty: Baton's own have them (docs/metrics.md).
    vllm_metrics: bool = False
    # Any further field of vLLM's AsyncEngineArgs; one that vLLM does not know, or that is set above, is refused before
    # anything starts.
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    # Epochs are milliseconds of the wall clock. Set a restarted worker's last epoch + 1 here, so that it looks newer
    # even if the clock was put back meanwhile; `baton up` does. 0: the clock alone.
    epoch_min: Count = 0
    start_timeout_s: Positive = 600.0
    # How long vLLM's processes have to end when the engine is closed; then vLLM kills them.
    close_timeout_s: NonNegative = 10.0
    # How much longer closing may take in all, before it is given up.
    close_grace_s: NonNegative = 5.0
    fake: FakeEngineConfig = FakeEngineConfig()

"""The four dashboards, as the JSON that the chart carries. Run `make chart` after a change."""

from __future__ import annotations

from pathlib import Path

from grafana import Dashboard, Panel

FOLDER = Path(__file__).parents[1] / "helm" / "baton" / "dashboards"

# Of every process, and of workers, which have a pool.
ALL = 'release=~"$release"'
WORKER = f'{ALL},pool=~"$pool"'


def rate(metric: str, labels: str = ALL, *, by: str = "") -> str:
    """The growth of ``metric`` in a second, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}[$__rate_interval]))"


def total(metric: str, labels: str = ALL, *, by: str = "") -> str:
    """``metric`` now, summed."""
    return f"sum{f' by ({by})' if by else ''} ({metric}{{{labels}}})"


def quantiles(metric: str, labels: str = ALL) -> dict[str, str]:
    """Three quantiles of a histogram."""
    return {
        f"p{percent}": f"histogram_quantile(0.{percent}, {rate(f'{metric}_bucket', labels, by='le')})"
        for percent in (50, 90, 99)
    }


def mean(metric: str, labels: str = ALL) -> str:
    """Mean of a histogram."""
    return f"{rate(f'{metric}_sum', labels)} / {rate(f'{metric}_count', labels)}"


USERS = Dashboard(
    "users",
    "Baton: users",
    {
        "Are users served?": [
            Panel(
                "Sequences that end", "reqps", {"{{outcome}}": rate("baton_front_proxy_requests_total", by="outcome")}
            ),
            Panel(
                "Share that fails",
                "percentunit",
                {
                    "failed": rate("baton_front_proxy_requests_total", f'{ALL},outcome="failed"')
                    + f" / {rate('baton_front_proxy_requests_total')}"
                },
            ),
            Panel("Time to the first token", "s", quantiles("baton_front_proxy_ttft_seconds")),
            Panel(
                "Goodput: requests that asked for a time",
                "reqps",
                {"{{outcome}}": rate("baton_front_proxy_slo_requests_total", by="outcome")},
                stacked=True,
            ),
        ],
        "What is asked": [
            Panel("Output tokens in a second", "short", {"tokens": rate("baton_front_proxy_output_tokens_total")}),
            Panel("Sequences that run", "short", {"running": total("baton_front_proxy_requests_in_flight")}),
            Panel("Failures", "reqps", {"{{kind}}": rate("baton_front_proxy_failures_total", by="kind")}),
            Panel("Refusals", "reqps", {"{{reason}}": rate("baton_front_proxy_refusals_total", by="reason")}),
        ],
    },
)

TIME = Dashboard(
    "time",
    "Baton: where time goes",
    {
        "To the first token": [
            Panel(
                "Mean time to the first token, by phase",
                "s",
                {
                    "{{phase}}": rate("baton_front_proxy_ttft_phase_seconds_sum", by="phase")
                    + f" / on () group_left () {rate('baton_front_proxy_ttft_seconds_count')}"
                },
                stacked=True,
            ),
            Panel("Reading and tokenising", "s", quantiles("baton_front_proxy_render_seconds")),
            Panel("A question to the scheduler", "s", quantiles("baton_front_proxy_plan_seconds")),
            Panel("Wait in the scheduler's queue", "s", quantiles("baton_scheduler_waited_seconds")),
        ],
        "From prefill to decode": [
            Panel("Hand-off", "s", quantiles("baton_front_proxy_handoff_seconds")),
            Panel("KV pulled", "Bps", {"{{pool}}": rate("baton_worker_kv_bytes_in", WORKER, by="pool")}),
            Panel(
                "Workers by how KV comes to them",
                "short",
                {"{{pool}} {{transport}}": total("baton_worker_kv_transport_info", WORKER, by="pool, transport")},
            ),
            Panel(
                "Where prompts are computed", "short", {"{{reason}}": rate("baton_scheduler_plans_total", by="reason")}
            ),
            Panel(
                "Error of predicted step times",
                "percentunit",
                {"{{role}}": f"max by (role) (baton_scheduler_latency_model_error{{{ALL}}})"},
            ),
        ],
        "In workers": [
            Panel("Wait in the engine's queue", "s", quantiles("baton_worker_queue_seconds", WORKER)),
            Panel("First scheduled to first token", "s", quantiles("baton_worker_compute_seconds", WORKER)),
            Panel("Mean requests in one message", "short", {"mean": mean("baton_worker_step_deltas", WORKER)}),
            Panel("Admission", "s", quantiles("baton_worker_admission_seconds", WORKER)),
        ],
    },
)

POOLS = Dashboard(
    "pools",
    "Baton: pools",
    {
        "How many workers": [
            Panel("Workers", "short", {"{{role}} {{state}}": total("baton_scheduler_workers", by="role, state")}),
            Panel(
                "Workers that are wanted",
                "short",
                {"{{pool}}": f"max by (pool) (baton_scheduler_desired_replicas{{{ALL}}})"},
            ),
            Panel(
                "Requests that wait for a pool to start",
                "short",
                {"waiting": total("baton_front_proxy_requests_waiting_for_pool")},
            ),
            Panel(
                "Where a worker's start goes",
                "s",
                {"{{phase}}": f"avg by (phase) (baton_worker_start_seconds{{{WORKER}}})"},
                stacked=True,
            ),
            Panel("Prompt tokens that wait", "short", {"tokens": total("baton_scheduler_queued_prefill_tokens")}),
            Panel("Requests", "short", {"{{pool}}": total("baton_worker_requests_live", WORKER, by="pool")}),
            Panel(
                "Requests that wait for room",
                "short",
                {"{{priority_class}}": total("baton_scheduler_waiting", by="priority_class")},
            ),
        ],
        "KV": [
            Panel(
                "KV in use",
                "percentunit",
                {
                    "{{pool}}": total("baton_worker_kv_blocks_used", WORKER, by="pool")
                    + f" / {total('baton_worker_kv_blocks_total', WORKER, by='pool')}"
                },
            ),
            Panel("KV that is promised", "short", {"blocks": total("baton_scheduler_reserved_blocks")}),
            Panel("Leases held", "short", {"{{pool}}": total("baton_worker_leases_held", WORKER, by="pool")}),
            Panel(
                "Prompt tokens",
                "short",
                {
                    "{{pool}} admitted": rate("baton_worker_prompt_tokens_total", WORKER, by="pool"),
                    "{{pool}} computed": rate("baton_worker_prompt_tokens_computed_total", WORKER, by="pool"),
                },
            ),
        ],
        "Engines and tiers": [
            Panel(
                "Share of time in steps",
                "percentunit",
                {"{{pod}}": rate("baton_worker_engine_seconds", WORKER, by="pod")},
            ),
            Panel(
                "Output tokens in a second",
                "short",
                {"{{pool}}": rate("baton_worker_output_tokens_total", WORKER, by="pool")},
            ),
            Panel("Blocks loaded from tiers", "short", {"{{tier}}": rate("baton_worker_tier_hits", WORKER, by="tier")}),
            Panel("Blocks in no tier", "short", {"{{tier}}": rate("baton_worker_tier_misses", WORKER, by="tier")}),
        ],
    },
)

TROUBLE = Dashboard(
    "trouble",
    "Baton: trouble",
    {
        "Schedulers": [
            Panel("Schedulers that lead (1)", "short", {"{{release}}": total("baton_scheduler_leads", by="release")}),
            Panel(
                "Front proxies that plan by themselves (0)", "short", {"degraded": total("baton_front_proxy_degraded")}
            ),
            Panel(
                "Sessions that ended",
                "short",
                {"{{peer}} {{reason}}": rate("baton_scheduler_sessions_closed_total", by="peer, reason")},
            ),
            Panel("Refused plans", "reqps", {"{{reason}}": rate("baton_scheduler_refusals_total", by="reason")}),
        ],
        "Workers": [
            Panel(
                "Workers that get nothing new (0)",
                "short",
                {"{{reason}}": total("baton_scheduler_unusable_workers", by="reason")},
            ),
            Panel("Ejections", "short", {"ejections": rate("baton_scheduler_ejections_total")}),
            Panel(
                "Engines that say nothing",
                "s",
                {"{{pod}}": f"max by (pod) (baton_worker_engine_silent_seconds{{{WORKER}}})"},
            ),
            Panel(
                "Requests that end in an error",
                "reqps",
                {"{{pool}}": rate("baton_worker_requests_ended_total", f'{WORKER},outcome="error"', by="pool")},
            ),
        ],
        "KV": [
            Panel(
                "Pulls that were no good (0)",
                "short",
                {
                    "{{pool}} wrong": rate("baton_worker_pulls_wrong", WORKER, by="pool"),
                    "{{pool}} unproved": rate("baton_worker_pulls_unproved", WORKER, by="pool"),
                    "{{pool}} failed": rate("baton_worker_pull_failures", WORKER, by="pool"),
                },
            ),
            Panel("Leases", "short", {"{{event}}": rate("baton_worker_lease_events_total", WORKER, by="event")}),
            Panel(
                "Corrupt blocks in tiers (0)",
                "short",
                {"{{tier}}": rate("baton_worker_tier_corrupt", WORKER, by="tier")},
            ),
            Panel("Leaked leases (0)", "short", {"{{worker}}": total("baton_scheduler_leaked_leases", by="worker")}),
        ],
        "Streams": [
            Panel(
                "Retries",
                "short",
                {"{{stage}} {{reason}}": rate("baton_front_proxy_retries_total", by="stage, reason")},
            ),
            Panel("Broken streams", "short", {"{{peer}}": rate("baton_front_proxy_stream_losses_total", by="peer")}),
            Panel("Resumed streams", "short", {"{{how}}": rate("baton_front_proxy_resumes_total", by="how")}),
            Panel(
                "Time until certificates end",
                "s",
                {"{{use}}": f"min by (use) (baton_certificate_expires_timestamp_seconds{{{ALL}}}) - time()"},
            ),
        ],
    },
)

DASHBOARDS = (USERS, TIME, POOLS, TROUBLE)


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(dashboard.json())


if __name__ == "__main__":
    main()

"""One routing policy a file, and how the configured ones are put together. No policy changes what it reads."""

from __future__ import annotations

from typing import assert_never

from scheduler.config import (
    KvHeadroomConfig,
    MaxScorePickerConfig,
    PickerConfig,
    ProfileConfig,
    QueueTimeConfig,
    RandomPickerConfig,
    RequestCountConfig,
    ScorerConfig,
)
from scheduler.routing.policies.excluded_filter import ExcludedFilter
from scheduler.routing.policies.kv_headroom import CapacityFilter, KvHeadroomFilter, KvHeadroomScorer
from scheduler.routing.policies.max_score_picker import MaxScorePicker
from scheduler.routing.policies.outlier_filter import OutlierFilter
from scheduler.routing.policies.prefill_backlog_filter import PrefillBacklogFilter
from scheduler.routing.policies.queue_time import QueueTimeScorer
from scheduler.routing.policies.random_picker import RandomPicker
from scheduler.routing.policies.ready_filter import ReadyFilter
from scheduler.routing.policies.request_count import RequestCountScorer, RequestSlotFilter
from scheduler.routing.policies.suspect_filter import SuspectFilter
from scheduler.routing.profile import Filter, Picker, Profile, Scorer


def prefill_profile(config: ProfileConfig, wait_max_s: float) -> Profile:
    """Choose a prefill worker. A prompt waits in the engine's queue for blocks, so present headroom only scores."""
    filters = (
        ReadyFilter(),
        ExcludedFilter(),
        OutlierFilter(),
        CapacityFilter(),
        RequestSlotFilter(),
        PrefillBacklogFilter(wait_max_s),
        SuspectFilter(),
    )
    return _profile(config, filters)


def decode_profile(config: ProfileConfig) -> Profile:
    """Choose a decode worker. Blocks are reserved, so they must be free now."""
    filters = (
        ReadyFilter(),
        ExcludedFilter(),
        OutlierFilter(),
        CapacityFilter(),
        KvHeadroomFilter(),
        RequestSlotFilter(),
        SuspectFilter(),
    )
    return _profile(config, filters)


def _profile(config: ProfileConfig, filters: tuple[Filter, ...]) -> Profile:
    return Profile(filters, [(_scorer(each), each.weight) for each in config.scorers], _picker(config.picker))


def _scorer(config: ScorerConfig) -> Scorer:
    match config:
        case QueueTimeConfig(half_score_s=half_score_s):
            return QueueTimeScorer(half_score_s)
        case KvHeadroomConfig():
            return KvHeadroomScorer()
        case RequestCountConfig(half_score_requests=half_score_requests):
            return RequestCountScorer(half_score_requests)
        case _:
            assert_never(config)


def _picker(config: PickerConfig) -> Picker:
    match config:
        case MaxScorePickerConfig():
            return MaxScorePicker()
        case RandomPickerConfig():
            return RandomPicker()
        case _:
            assert_never(config)

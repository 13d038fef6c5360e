"""Counts of routed tokens by layer and expert: read from files, or made from a seed in DeepSeek-V3's shape.

A file is JSON as SGLang's recorder dumps it: ``{"logical_count": [[tokens by expert] by layer]}``. A third, leading
dimension (steps) is summed. Layers without any token are dense ones and are left out.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import numpy as np

from engine.expert_map import Array
from runtime.user_error import UserError

LAYERS, EXPERTS, GROUPS, TOP_K = 58, 256, 8, 8
# The skew of one layer's experts, from the mildest pair of workloads to the hardest: log-normal, over their own and
# their group's popularity, and at most so many times the mean.
_OWN_SIGMAS = (0.63, 0.66, 0.68, 0.70, 0.71, 0.71)
_GROUP_SIGMAS = (0.34, 0.38, 0.43, 0.48, 0.53, 0.57)
_TIMES_MEAN_MAX = 13.0
# How alike prefill and decode of one workload are: correlation of the popularities' logarithms.
_LIKENESS = (0.92, 0.87, 0.82, 0.76, 0.70, 0.66)
# How alike the prefills are to one another, and what sets decodes apart from them.
_SHARED = 0.95
TOKENS = 1_000_000


class BadCounts(UserError):
    """Counts that are missing or not of one shape; the message names the file."""


def read(folder: Path) -> dict[str, Array]:
    """Every ``*.json`` of a folder, by name without the ending: [layers, experts]. Raises BadCounts."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise BadCounts(f"counts: {folder} is no folder with JSON files of counts")
    found = {file.stem: read_file(file) for file in files}
    shapes = {name: counts.shape for name, counts in found.items()}
    if len(set(shapes.values())) > 1:
        raise BadCounts(f"counts: the files of {folder} have different shapes: {shapes}")
    return found


def read_file(file: Path) -> Array:
    """One file's counts, [layers, experts]. Raises BadCounts."""
    try:
        counts = np.array(msgspec.json.decode(file.read_bytes())["logical_count"], dtype=np.float64)
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise BadCounts(f"counts: {file} holds no logical_count of numbers [layers][experts]: {error}") from None
    if counts.ndim == 3:
        counts = counts.sum(axis=0)
    if counts.ndim != 2 or not counts.sum() > 0:
        raise BadCounts(
            f"counts: logical_count of {file} has the shape {counts.shape}, not [layers][experts] of counts"
        )
    return np.asarray(counts[counts.sum(axis=1) > 0])


def made(seed: int, tokens: int = TOKENS) -> dict[str, Array]:
    """Twelve workloads, six pairs of prefill and decode, of ``tokens`` tokens each, with DeepSeek-V3's skew."""
    chance = np.random.default_rng(seed)
    common, decoded = _popularity(chance), _popularity(chance)
    workloads = {}
    for number, (likeness, *sigmas) in enumerate(zip(_LIKENESS, _OWN_SIGMAS, _GROUP_SIGMAS, strict=True)):
        prefill = _mixed(common, _popularity(chance), _SHARED)
        decode = _mixed(prefill, _mixed(decoded, _popularity(chance), _SHARED), likeness)
        workloads[f"prefill_{number}"] = drawn(_skew(prefill, *sigmas), tokens, chance)
        workloads[f"decode_{number}"] = drawn(_skew(decode, *sigmas), tokens, chance)
    return dict(sorted(workloads.items()))


def drawn(shares: Array, tokens: int, chance: np.random.Generator) -> Array:
    """What ``tokens`` tokens, each routed to TOP_K experts, count where experts have these shares in the long run."""
    expected = shares / shares.sum(axis=1, keepdims=True) * tokens * TOP_K
    return np.asarray(chance.poisson(expected), dtype=np.float64)


def changes(workloads: dict[str, Array]) -> list[tuple[str, str]]:
    """Pairs of a workload and the next of its kind (the name up to its first digit or ``_``)."""
    kinds = itertools.groupby(sorted(workloads), key=lambda name: name.split("_")[0].rstrip("0123456789"))
    return [pair for _, names in kinds for pair in itertools.pairwise(names)]


def _popularity(chance: np.random.Generator) -> tuple[Array, Array]:
    return chance.standard_normal((LAYERS, EXPERTS)), chance.standard_normal((LAYERS, GROUPS))


def _mixed(old: tuple[Array, Array], new: tuple[Array, Array], likeness: float) -> tuple[Array, Array]:
    rest = (1 - likeness**2) ** 0.5
    return likeness * old[0] + rest * new[0], likeness * old[1] + rest * new[1]


def _skew(popularity: tuple[Array, Array], own_sigma: float, group_sigma: float) -> Array:
    own, groups = popularity
    skewed = np.exp(own_sigma * own + group_sigma * np.repeat(groups, EXPERTS // GROUPS, axis=1))
    return np.asarray(np.minimum(skewed, _TIMES_MEAN_MAX * skewed.mean(axis=1, keepdims=True)))

"""A measured profile as one HTML file: its cells as points, its laws as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.cluster.measurements import Measurements
from simulation.replay.cluster_model import ClusterModel
from simulation.sizing import svg
from simulation.sizing.svg import Axes, Point, Scale

_STEPS = 60


def page(profile: LatencyProfile, model: ClusterModel, said: Sequence[str]) -> str:
    """The whole file. ``model``: the laws as replays use them; ``said``: lines for people."""
    cells = profile.measured
    assert cells is not None
    pictures = [_prompts(cells, model), _steps(cells, model), _handoffs(cells, model)]
    facts = [f"flags: {profile.fingerprint.flags}", "points: measured; lines: the laws that replays use"]
    bad = [f"The numbers are not good: {cells.not_good}"] if cells.not_good else []
    return svg.page("How fast this engine is", [*bad, *said], facts, "".join(pictures))


def _prompts(cells: Measurements, model: ClusterModel) -> str:
    points: dict[str, list[Point]] = {}
    laws: dict[str, list[Point]] = {}
    for cell in sorted(cells.prefill, key=lambda each: (each.cached_tokens, each.uncached_tokens)):
        points.setdefault(f"{cell.cached_tokens} cached", []).append((cell.uncached_tokens, cell.seconds * 1e3))
    for name, measured in points.items():
        cached = int(name.split()[0])
        laws[name] = [
            (n, 1e3 * model.prompts.prompt_s(n, cached, model.batched_tokens_max))
            for n in map(round, _between(measured))
        ]
    return _picture("prompts, ms", "tokens to compute", points, laws)


def _steps(cells: Measurements, model: ClusterModel) -> str:
    """Contexts of a sequence are put together by the nearest power of two: they grow a little while they decode."""
    points: dict[str, list[Point]] = {}
    laws: dict[str, list[Point]] = {}
    law = model.step
    for cell in sorted(cells.decode, key=lambda each: (each.context_tokens // each.requests, each.requests)):
        context = 1 << (cell.context_tokens // cell.requests).bit_length() - 1
        points.setdefault(f"{context} tokens each", []).append((cell.requests, cell.seconds * 1e3))
    for name, measured in points.items():
        context = int(name.split()[0])
        batches = sorted({round(n) for n in _between(sorted(measured))})
        laws[name] = [(n, 1e3 * (law.fixed_s + law.decode_s(n, n * context))) for n in batches]
    return _picture("decode steps, ms", "sequences", points, laws)


def _handoffs(cells: Measurements, model: ClusterModel) -> str:
    points: dict[str, list[Point]] = {}
    laws: dict[str, list[Point]] = {}
    for cell in sorted(cells.handoff, key=lambda each: (each.pulls, each.size_bytes)):
        name = f"{cell.pulls} at once"
        points.setdefault(name, []).append((cell.size_bytes / 1e6, cell.seconds * 1e3))
    if alone := points.get("1 at once"):
        link, step_s = model.link, model.step.fixed_s
        laws["1 at once"] = [(size, 1e3 * (link.transfer_s(size * 1e6) + step_s)) for size in _between(alone)]
    return _picture("hand-offs, ms", "MB of one hand-off", points, laws)


def _between(points: Sequence[Point]) -> list[float]:
    scale = Scale(points[0][0], points[-1][0], logarithmic=True)
    return [scale.value(step / _STEPS) for step in range(_STEPS + 1)]


def _picture(title: str, label: str, points: Mapping[str, Sequence[Point]], laws: Mapping[str, Sequence[Point]]) -> str:
    """Both scales are logarithmic."""
    every = [point for each in (*points.values(), *laws.values()) for point in each]
    if not every:
        return ""
    x, y = [point[0] for point in every], [point[1] for point in every]
    axes = Axes(
        Scale(min(x) / 1.2, max(x) * 1.2, logarithmic=True), Scale(min(y) / 1.2, max(y) * 1.2, logarithmic=True)
    )
    made = [axes.grid(), axes.ticks(label)]
    for number, (name, measured) in enumerate(points.items()):
        colour = svg.COLOURS[number % len(svg.COLOURS)]
        if law := laws.get(name):
            made.append(svg.line([axes.at(*point) for point in law], colour))
        made += [svg.dot(axes.at(*point), colour) for point in measured]
        made.append(svg.text(svg.LEFT + 130 + 118 * number, 20, name, "start", colour))
    return svg.picture(title, "".join(made))

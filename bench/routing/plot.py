"""Goodput and p99 TTFT by load and policy, as a PNG. Drawn with Pillow, which vLLM brings along."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.routing.table import OURS, Row

_PANEL_WIDTH, _PANEL_HEIGHT, _MARGIN, _LEGEND_WIDTH = 560, 420, 60, 170
_COLOURS = (
    "#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#3b3b98",
)  # fmt: skip
_OURS_COLOUR = "#d62728"


def save(rows: Sequence[Row], title: str, file: Path) -> None:
    """Write the picture of all rows."""
    image = Image.new("RGB", (2 * _PANEL_WIDTH + _LEGEND_WIDTH, _PANEL_HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    policies = sorted({row.policy for row in rows})
    others = iter(_COLOURS * (1 + len(policies) // len(_COLOURS)))
    colours = {policy: _OURS_COLOUR if policy == OURS else next(others) for policy in policies}
    draw.text((_MARGIN, 8), title, fill="black", font=font)
    _panel(draw, 0, "goodput, requests/s, by load", _lines(rows, "goodput_rps"), colours)
    _panel(draw, _PANEL_WIDTH, "p99 TTFT, s, by load", _lines(rows, "ttft_p99_s"), colours)
    for index, (policy, colour) in enumerate(colours.items()):
        y = _MARGIN + 22 * index
        draw.line((2 * _PANEL_WIDTH, y + 8, 2 * _PANEL_WIDTH + 22, y + 8), fill=colour, width=3)
        draw.text((2 * _PANEL_WIDTH + 30, y), policy, fill="black", font=font)
    image.save(file, format="PNG")


_Lines = dict[str, list[tuple[float, float]]]


def _lines(rows: Sequence[Row], field: str) -> _Lines:
    """For each policy, the mean over its seeds at each load."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row.policy, {}).setdefault(row.load, []).append(getattr(row, field))
    return {
        policy: [(load, statistics.fmean(by_load[load])) for load in sorted(by_load)]
        for policy, by_load in found.items()
    }


def _panel(draw: ImageDraw.ImageDraw, left: int, title: str, lines: _Lines, colours: dict[str, str]) -> None:
    """One pair of axes from zero, and a line for each policy."""
    font = ImageFont.load_default(12)
    x_most = max(load for line in lines.values() for load, _ in line) * 1.05
    y_most = max(value for line in lines.values() for _, value in line) * 1.1 or 1.0
    bottom, width = _PANEL_HEIGHT - _MARGIN, _PANEL_WIDTH - 2 * _MARGIN
    height = bottom - _MARGIN

    def at(load: float, value: float) -> tuple[float, float]:
        return left + _MARGIN + width * load / x_most, bottom - height * value / y_most

    draw.text((left + _MARGIN, _MARGIN - 24), title, fill="black", font=font)
    for part in range(5):
        value = y_most * part / 4
        x, y = at(0, value)
        draw.line((x, y, x + width, y), fill="#dddddd")
        draw.text((x - 44, y - 7), f"{value:.3g}", fill="black", font=font)
    for load in sorted({load for line in lines.values() for load, _ in line}):
        x, y = at(load, 0)
        draw.text((x - 10, y + 8), f"{load:g}", fill="black", font=font)
    for policy, line in sorted(lines.items(), key=lambda one: one[0] == OURS):
        points = [at(load, value) for load, value in line]
        width_px = 4 if policy == OURS else 2
        draw.line(points, fill=colours[policy], width=width_px)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colours[policy])

"""Pictures of the reports as SVG: axes, lines, points, texts. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 620, 300, 64, 34, 52, 20
GRID = "#dddddd"
TICKS_MAX = 8
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; color: #222 }
svg { border: 1px solid #ddd; margin: 0 12px 12px 0 } svg text { font: 12px system-ui, sans-serif; fill: #333 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 2px 10px; text-align: right }
td:first-child, td:last-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
.best { font-weight: bold }
"""

Point = tuple[float, float]


class Scale:
    """Maps values of a range to 0..1. A logarithmic one needs values above 0."""

    def __init__(self, low: float, high: float, *, logarithmic: bool = False) -> None:
        self._logarithmic = logarithmic
        self._low, self._high = self._of(low), self._of(high)

    def _of(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value

    def share(self, value: float) -> float:
        """Where it is."""
        return (self._of(value) - self._low) / ((self._high - self._low) or 1.0)

    def value(self, share: float) -> float:
        """What is there."""
        at = self._low + share * (self._high - self._low)
        return float(10**at) if self._logarithmic else at

    def ticks(self) -> list[float]:
        """Round values of the range, few of them."""
        low, high = self.value(0.0), self.value(1.0)
        if not self._logarithmic:
            size = 10.0 ** math.floor(math.log10((high - low) / TICKS_MAX or 1.0))
            step = next(size * by for by in (1, 2, 5, 10) if high - low <= size * by * TICKS_MAX)
            return [round(n * step, 9) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
        decades, found = range(math.floor(self._low), math.ceil(self._high) + 1), list[float]()
        for each in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
            found = [by * 10.0**decade for decade in decades for by in each if low <= by * 10.0**decade <= high]
            if len(found) <= TICKS_MAX:
                break
        return found


class Axes:
    """Of one picture."""

    def __init__(self, x: Scale, y: Scale) -> None:
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> Point:
        """The place of a point, in pixels."""
        across = LEFT + self.x.share(x) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - self.y.share(y) * (HEIGHT - TOP - BOTTOM), 1)

    def grid(self, form: str = "g") -> str:
        """Lines at round values."""
        made = []
        for value in self.y.ticks():
            y = round(HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - TOP - BOTTOM), 1)
            made.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{GRID}"/>')
            made.append(text(LEFT - 6, y + 4, format(value, form), "end"))
        return "".join(made)

    def ticks(self, label: str) -> str:
        """Round values below, and what they are."""
        places = [(LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT), value) for value in self.x.ticks()]
        made = [text(x, HEIGHT - BOTTOM + 18, f"{value:g}") for x, value in places]
        return "".join([*made, text(WIDTH / 2, HEIGHT - 12, label)])


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "") -> str:
    """One line of text."""
    style = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}"{style}>{html.escape(words)}</text>'


def line(points: Sequence[Point], colour: str) -> str:
    """Through places in pixels."""
    places = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'


def dot(at: Point, colour: str) -> str:
    """A point."""
    return f'<circle cx="{at[0]}" cy="{at[1]}" r="4" fill="{colour}"/>'


def picture(title: str, inner: str) -> str:
    """A whole one."""
    return f'<svg width="{WIDTH}" height="{HEIGHT}">{text(LEFT, 20, title, "start")}{inner}</svg>'


def page(title: str, said: Sequence[str], facts: Sequence[str], inner: str) -> str:
    """An HTML file that needs nothing else."""
    sentences = "".join(f"<p>{html.escape(each)}</p>" for each in said)
    about = "".join(f"<li>{html.escape(each)}</li>" for each in facts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{sentences}<ul>{about}</ul>{inner}</html>\n"
    )

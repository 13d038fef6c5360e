"""The answer as one HTML file: sentences, pictures in SVG, the table. It needs nothing else and opens offline."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from simulation.sizing.answer import Answer, Row, sentences

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 620, 300, 64, 34, 52
_PLAIN, _BEST, _GRID = "#4c78a8", "#d62728", "#dddddd"
_USES = (
    ("prefill", "prefill workers", "#4c78a8"),
    ("decode", "decode workers", "#f58518"),
    ("decode_kv", "decode KV", "#54a24b"),
    ("network", "network", "#9d755d"),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; color: #222 }
svg { border: 1px solid #ddd; margin: 0 12px 12px 0 } svg text { font: 12px system-ui, sans-serif; fill: #333 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 2px 10px; text-align: right }
td:first-child, td:last-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
.best { font-weight: bold }
"""


def page(answer: Answer, title: str, facts: Sequence[str]) -> str:
    """The whole file. ``facts``: lines about the workload and the profile."""
    rows = [row for row in answer.rows if row.decode]
    pictures = [
        _bars(rows, answer),
        _uses(rows),
        _scatter(rows, answer, "TTFT p99, s", lambda row: row.ttft_p99_s, lambda row: row.pareto_ttft),
        _scatter(rows, answer, "ITL p99, ms", lambda row: row.itl_p99_s * 1e3, lambda row: row.pareto_itl),
    ]
    said = "".join(f"<p>{html.escape(each)}</p>" for each in sentences(answer))
    about = "".join(f"<li>{html.escape(each)}</li>" for each in facts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{said}<ul>{about}</ul>{''.join(pictures)}"
        f"{_table(answer)}</html>\n"
    )


class _Axes:
    """Maps values to places of one picture. ``x_logarithmic`` needs values above 0."""

    def __init__(self, x: tuple[float, float], y_most: float, *, x_logarithmic: bool = False) -> None:
        self._scale: Callable[[float], float] = math.log10 if x_logarithmic else float
        self._x0, self._x1 = self._scale(x[0]), self._scale(x[1])
        self._y_most = y_most or 1.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        share = (self._scale(x) - self._x0) / ((self._x1 - self._x0) or 1.0)
        across = _LEFT + share * (_WIDTH - _LEFT - 20)
        return round(across, 1), round(_HEIGHT - _BOTTOM - y / self._y_most * (_HEIGHT - _TOP - _BOTTOM), 1)

    def grid(self, form: str) -> str:
        made = []
        for part in range(5):
            value = self._y_most * part / 4
            y = round(_HEIGHT - _BOTTOM - part / 4 * (_HEIGHT - _TOP - _BOTTOM), 1)
            made.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y}" y2="{y}" stroke="{_GRID}"/>')
            made.append(_text(_LEFT - 6, y + 4, format(value, form), "end"))
        return "".join(made)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _picture(title: str, inner: str) -> str:
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}">{_text(_LEFT, 20, title, "start")}{inner}</svg>'


def _ticks(rows: Sequence[Row], axes: _Axes) -> str:
    """The names of the splits below the picture."""
    every = -(-len(rows) // 17)
    return "".join(
        _text(axes.at(index, 0)[0], _HEIGHT - _BOTTOM + 16 + 14 * (index // every % 2), _short(row))
        for index, row in enumerate(rows)
        if index % every == 0
    )


def _short(row: Row) -> str:
    return "together" if row.collocated else str(row.split)


def _bars(rows: Sequence[Row], answer: Answer) -> str:
    axes = _Axes((-0.6, len(rows) - 0.4), max(row.goodput_rps for row in rows) * 1.15)
    width = 0.6 * (_WIDTH - _LEFT - 20) / len(rows)
    made = [axes.grid(".2f"), _ticks(rows, axes)]
    for index, row in enumerate(rows):
        x, y = axes.at(index, row.goodput_rps)
        base, colour = axes.at(index, 0)[1], _BEST if row.split == answer.best else _PLAIN
        height = round(base - y, 1)
        made.append(f'<rect x="{x - width / 2:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"/>')
        half = row.goodput_spread_rps / 2
        low, high = axes.at(index, max(0.0, row.goodput_rps - half))[1], axes.at(index, row.goodput_rps + half)[1]
        made.append(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="black"/>')
    return _picture("goodput, requests/s, by split; lines: from the worst to the best seed", "".join(made))


def _uses(rows: Sequence[Row]) -> str:
    axes = _Axes((-0.6, len(rows) - 0.4), 1.0)
    made = [axes.grid(".0%"), _ticks(rows, axes)]
    for number, (name, label, colour) in enumerate(_USES):
        points = [axes.at(index, min(1.0, getattr(row.use, name))) for index, row in enumerate(rows)]
        made.append(_line(points, colour))
        made.append(f'<text x="{_LEFT + 125 + 118 * number}" y="20" style="fill:{colour}">{html.escape(label)}</text>')
    return _picture("how much is used:", "".join(made))


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    places = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _scatter(
    rows: Sequence[Row], answer: Answer, label: str, value: Callable[[Row], float], on_front: Callable[[Row], bool]
) -> str:
    """Goodput per GPU against one latency, its scale logarithmic, with the Pareto front."""
    shown = [row for row in rows if value(row) > 0.0]
    if not shown:
        return ""
    least, most = min(map(value, shown)), max(map(value, shown))
    axes = _Axes((least / 1.2, most * 1.2), max(row.goodput_per_gpu_rps for row in shown) * 1.15, x_logarithmic=True)
    front = sorted((row for row in shown if on_front(row)), key=value)
    made = [axes.grid(".3f"), _line([axes.at(value(row), row.goodput_per_gpu_rps) for row in front], _GRID)]
    taken: list[tuple[float, float]] = []
    for row in shown:
        x, y = axes.at(value(row), row.goodput_per_gpu_rps)
        colour = _BEST if row.split == answer.best else _PLAIN
        made.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
        if all(abs(x - a) > 56 or abs(y - b) > 13 for a, b in taken) or row.split == answer.best:
            taken.append((x, y))
            made.append(_text(x + 6, y - 6, _short(row), "start"))
    ticks = [least * (most / least) ** (part / 4) for part in range(5)] if most > least else [least]
    made += [_text(axes.at(tick, 0)[0], _HEIGHT - _BOTTOM + 18, f"{tick:.3g}") for tick in ticks]
    made.append(_text(_WIDTH / 2, _HEIGHT - 12, label))
    return _picture(f"goodput per GPU, requests/s, against {label}; the line is the Pareto front", "".join(made))


_COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("split", lambda row: str(row.split)),
    ("goodput/s", lambda row: f"{row.goodput_rps:.3f}"),
    ("per GPU", lambda row: f"{row.goodput_per_gpu_rps:.4f}"),
    ("kept", lambda row: f"{row.attainment:.1%}"),
    ("TTFT p50, s", lambda row: f"{row.ttft_p50_s:.2f}"),
    ("TTFT p99, s", lambda row: f"{row.ttft_p99_s:.2f}"),
    ("ITL p50, ms", lambda row: f"{row.itl_p50_s * 1e3:.1f}"),
    ("ITL p99, ms", lambda row: f"{row.itl_p99_s * 1e3:.1f}"),
    ("law/s", lambda row: f"{row.closed_form_rps:.2f}"),
    ("highest/s", lambda row: "" if row.highest_rps is None else f"{row.highest_rps:.2f}"),
    ("limit", lambda row: row.limit),
)


def _table(answer: Answer) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in _COLUMNS)
    lines = [
        f"<tr{' class=best' if row.split == answer.best else ''}>"
        + "".join(f"<td>{html.escape(shown(row))}</td>" for _, shown in _COLUMNS)
        + "</tr>"
        for row in answer.rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"

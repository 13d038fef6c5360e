"""The answer as one HTML file: sentences, pictures in SVG, the table. It needs nothing else and opens offline."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from simulation.sizing import svg
from simulation.sizing.answer import Answer, Row, sentences
from simulation.sizing.svg import BOTTOM, HEIGHT, LEFT, WIDTH, Axes, Scale

_PLAIN, _BEST, _FRONT = svg.COLOURS[0], "#d62728", "#999999"
_USES = (
    ("prefill", "prefill workers"),
    ("decode", "decode workers"),
    ("decode_kv", "decode KV"),
    ("network", "network"),
)
_NAMES_MAX = 17
"""Of splits below a picture."""


def page(answer: Answer, title: str, facts: Sequence[str]) -> str:
    """The whole file. ``facts``: lines about the workload and the profile."""
    rows = [row for row in answer.rows if row.decode]
    pictures = [
        _bars(rows, answer),
        _uses(rows),
        _scatter(rows, answer, "TTFT p99, s", lambda row: row.ttft_p99_s, lambda row: row.pareto_ttft),
        _scatter(rows, answer, "ITL p99, ms", lambda row: row.itl_p99_s * 1e3, lambda row: row.pareto_itl),
    ]
    return svg.page(title, sentences(answer), facts, "".join(pictures) + _table(answer))


def _by_split(rows: Sequence[Row], most: float) -> Axes:
    return Axes(Scale(-0.6, len(rows) - 0.4), Scale(0.0, most or 1.0))


def _ticks(rows: Sequence[Row], axes: Axes) -> str:
    """The names of the splits below the picture."""
    every = -(-len(rows) // _NAMES_MAX)
    return "".join(
        svg.text(axes.at(index, 0)[0], HEIGHT - BOTTOM + 16 + 14 * (index // every % 2), _short(row))
        for index, row in enumerate(rows)
        if index % every == 0
    )


def _short(row: Row) -> str:
    return "together" if row.collocated else str(row.split)


def _bars(rows: Sequence[Row], answer: Answer) -> str:
    axes = _by_split(rows, max(row.goodput_rps for row in rows) * 1.15)
    width = 0.6 * (WIDTH - LEFT - svg.RIGHT) / len(rows)
    made = [axes.grid(), _ticks(rows, axes)]
    for index, row in enumerate(rows):
        x, y = axes.at(index, row.goodput_rps)
        base, colour = axes.at(index, 0)[1], _BEST if row.split == answer.best else _PLAIN
        height = round(base - y, 1)
        made.append(f'<rect x="{x - width / 2:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"/>')
        half = row.goodput_spread_rps / 2
        low, high = axes.at(index, max(0.0, row.goodput_rps - half))[1], axes.at(index, row.goodput_rps + half)[1]
        made.append(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="black"/>')
    return svg.picture("goodput, requests/s, by split; lines: from the worst to the best seed", "".join(made))


def _uses(rows: Sequence[Row]) -> str:
    axes = _by_split(rows, 1.0)
    made = [axes.grid(".0%"), _ticks(rows, axes)]
    for number, (name, label) in enumerate(_USES):
        colour = svg.COLOURS[number]
        points = [axes.at(index, min(1.0, getattr(row.use, name))) for index, row in enumerate(rows)]
        made.append(svg.line(points, colour))
        made.append(svg.text(LEFT + 60 + 135 * number, 20, label, "start", colour))
    return svg.picture("used:", "".join(made))


def _scatter(
    rows: Sequence[Row], answer: Answer, label: str, value: Callable[[Row], float], on_front: Callable[[Row], bool]
) -> str:
    """Goodput per GPU against one latency, its scale logarithmic, with the Pareto front."""
    shown = [row for row in rows if value(row) > 0.0]
    if not shown:
        return ""
    least, most = min(map(value, shown)), max(map(value, shown))
    goodputs = [row.goodput_per_gpu_rps for row in shown]
    goodput = Scale(0.95 * min(goodputs), 1.05 * max(goodputs) or 1.0)
    axes = Axes(Scale(least / 1.2, most * 1.2, logarithmic=True), goodput)
    front = sorted((row for row in shown if on_front(row)), key=value)
    made = [axes.grid(), svg.line([axes.at(value(row), row.goodput_per_gpu_rps) for row in front], _FRONT)]
    taken: list[tuple[float, float]] = []
    dots: list[str] = []
    # The recommended one and those on the front are named first: where names would overlap, others have none.
    for row in sorted(shown, key=lambda row: (row.split != answer.best, not on_front(row))):
        x, y = axes.at(value(row), row.goodput_per_gpu_rps)
        dots.append(svg.dot((x, y), _BEST if row.split == answer.best else _PLAIN))
        if all(abs(x - a) > 56 or abs(y - b) > 13 for a, b in taken):
            taken.append((x, y))
            room = x < WIDTH - 80
            made.append(svg.text(x + 6 if room else x - 6, y - 6, _short(row), "start" if room else "end"))
    # The recommended one is drawn last, above its equals.
    made += [*reversed(dots), axes.ticks(label)]
    return svg.picture(f"good requests/s per GPU against {label}; line: the Pareto front", "".join(made))


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

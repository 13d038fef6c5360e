"""Load and placement of experts by layer and rank, as a picture: PNG, or coloured text for a terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.expert_map import Array, ExpertMap, per_expert

# Load over the mean: below it blue, at it white, above it red, from none to this and more.
_TIMES_MEAN_MAX = 2.0
_COLD, _MEAN, _HOT = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_FEW, _MANY = (247, 247, 247), (0, 68, 27)
_MARGIN, _TITLE, _LEGEND = 54, 44, 60
_PANEL_MAX = 900


def relative_load(placed: ExpertMap, counts: Array) -> Array:
    """[layers, ranks]: each rank's load over the layer's mean; 1 everywhere is perfect."""
    loads = placed.loads(counts)
    return np.asarray(loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-12))


def copied_slots(placed: ExpertMap) -> Array:
    """[layers, ranks]: the part of a rank's slots whose expert another rank holds too."""
    copies = per_expert(placed.slots, np.ones(placed.slots.shape), placed.experts)
    rows = np.arange(len(placed.slots))[:, None, None]
    return np.asarray((copies[rows, placed.slots] > 1).mean(-1))


def as_text(load: Array, *, colour: bool) -> list[str]:
    """A row a layer, a character a rank: tenths of the mean above it as digits, below it as letters; ``.``: at it."""
    lines = [f"{'layer':>6}  load of each rank over the mean: . within 5 %, 1-9 so many tenths above, a-i below"]
    for layer, row in enumerate(load):
        cells = "".join(_cell(value, colour=colour) for value in row)
        lines.append(f"{layer:>6}  {cells}  highest {row.max():.3f} on rank {int(row.argmax())}")
    return lines


def save(load: Array, copied: Array, title: str, file: Path) -> None:
    """Write both pictures side by side: layers downwards, ranks to the right. Drawn with Pillow, as vLLM brings it."""
    from PIL import Image, ImageDraw, ImageFont

    layers, ranks = load.shape
    across, down = max(3, _PANEL_MAX // ranks // 2), max(3, _PANEL_MAX // layers // 2)
    width, height = ranks * across, layers * down
    panel = width + _MARGIN + _LEGEND + 50
    image = Image.new("RGB", (2 * panel, height + _TITLE + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    half = load / _TIMES_MEAN_MAX
    pictures = (
        ("load over the mean", _diverging(half), _diverging, f"{_TIMES_MEAN_MAX:g}x and more", "0"),
        ("slots whose expert has other copies", _growing(copied), _growing, "all", "none"),
    )
    draw.text((_MARGIN, 4), title, fill="black", font=ImageFont.load_default(14))
    for number, (name, pixels, scale, most, least) in enumerate(pictures):
        left = number * panel + _MARGIN
        draw.text((left, _TITLE - 18), name, fill="black", font=font)
        cells = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        image.paste(cells, (left, _TITLE))
        draw.rectangle((left - 1, _TITLE - 1, left + width, _TITLE + height), outline="#888888")
        for layer in range(0, layers, -(-layers // 6)):
            draw.text((left - 24, _TITLE + layer * down), str(layer), fill="black", font=font)
        for rank in range(0, ranks, -(-ranks // 8)):
            draw.text((left + rank * across, _TITLE + height + 4), str(rank), fill="black", font=font)
        draw.text((left - _MARGIN + 4, _TITLE - 18), "layer", fill="black", font=font)
        draw.text((left, _TITLE + height + 20), "rank", fill="black", font=font)
        bar = np.linspace(1, 0, height)[:, None] * np.ones((1, 14))
        at = left + width + 12
        image.paste(Image.fromarray(scale(bar)), (at, _TITLE))
        draw.text((at + 18, _TITLE - 4), most, fill="black", font=font)
        draw.text((at + 18, _TITLE + height - 10), least, fill="black", font=font)
    image.save(file, format="PNG")


def _cell(value: float, *, colour: bool) -> str:
    tenths = min(9, int(abs(value - 1) * 10 + 0.5))
    letter = "." if tenths == 0 else (str(tenths) if value > 1 else "abcdefghi"[tenths - 1])
    if not colour:
        return letter
    red, green, blue = _diverging(np.array([[value / _TIMES_MEAN_MAX]]))[0, 0]
    return f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m{letter}\x1b[0m"


def _diverging(half: Array) -> Array:
    """Colours of [0, 1], one half being the mean: uint8 [..., 3]."""
    at = np.clip(half, 0, 1)[..., None]
    below = _blend(_COLD, _MEAN, at * 2)
    return np.asarray(np.where(at < 0.5, below, _blend(_MEAN, _HOT, at * 2 - 1))).astype(np.uint8)


def _growing(part: Array) -> Array:
    return _blend(_FEW, _MANY, np.clip(part, 0, 1)[..., None]).astype(np.uint8)


def _blend(start: tuple[int, int, int], end: tuple[int, int, int], at: Array) -> Array:
    return np.asarray(np.array(start) * (1 - at) + np.array(end) * at)

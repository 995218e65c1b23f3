"""The paper's layer x expert heat map, for widths, sensitivities and token counts.

Cells are drawn as strokes, one path a shade ("h8m1 0" is a cell and the gap after it), which keeps 48 x 128 experts
at some 40 kB a panel. What is written on them and the marks are drawn over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

from mopeq.report.scales import SHADES, Scale
from mopeq.report.svg import number, significant, svg

HEAT_WIDTH = 1030  # px of cells a heat map aims for
LEFT, TOP, RIGHT = 34, 22, 46


@dataclass(frozen=True)
class Cells:
    """A heat map's cells: a shade of `family` for each [L, E] (-1: no such expert), and what is written on them.

    digits: one character a shade, where shades are few. crossed, dashed: cells marked with x and with -.
    margin: one text a layer, at the right.
    """

    family: str
    shade_LE: np.ndarray
    layers: Sequence[int]
    digits: Mapping[int, str] | None = None
    crossed: np.ndarray | None = None
    dashed: np.ndarray | None = None
    margin: Sequence[str] = ()
    margin_title: str = ""


def cell_size(experts: int) -> tuple[int, int]:
    """(width, height) of a cell in px."""
    width = min(26, max(4, HEAT_WIDTH // experts))
    return width, min(18, max(7, width + 1))


def heat_width(cells: Cells) -> int:
    """Px a heat map is drawn for."""
    columns = cells.shade_LE.shape[1]
    return LEFT + columns * cell_size(columns)[0] + (RIGHT if len(cells.margin) else 8)


def heat_map(cells: Cells, title: str) -> Markup:
    """Layers by rows, experts by columns."""
    rows, columns = cells.shade_LE.shape
    w, h = cell_size(columns)
    width, height = heat_width(cells), TOP + rows * h + 4
    parts = [paths(cells, w, h), axes(cells.layers, columns, w, h)]
    if cells.digits and w >= 8:
        parts.append(digits(cells, w, h))
    parts += [marks(at, kind, w, h) for at, kind in ((cells.crossed, "x"), (cells.dashed, "m")) if at is not None]
    if len(cells.margin):
        x = LEFT + columns * w + 6
        parts.append(f'<text class="ax" x="{x}" y="{TOP - 7}">{escape(cells.margin_title)}</text>')
        step = label_step(h)
        parts += [
            f'<text class="ax mean" data-row="{i}" x="{x}" y="{number(TOP + (i + 0.5) * h + 3.5)}">'
            f"{escape(text)}</text>"
            for i, text in enumerate(cells.margin)
            if i % step == 0
        ]
    box = f'x="-1" width="{w + 1}" height="{h}"'
    parts.append(f'<g class="cur" visibility="hidden"><rect class="halo" {box}/><rect {box}/></g>')
    place = f' data-x="{LEFT}" data-y="{TOP}" data-w="{w}" data-h="{h}"'
    place += f' data-rows="{rows}" data-columns="{columns}"'
    return svg(
        width,
        height,
        "".join(parts),
        title,
        "heat",
        place,
        least=width - columns * (w - min(w, max(5.0, 360 / columns))),
    )


def paths(cells: Cells, w: int, h: int) -> str:
    """One stroked path a shade; a gap of 1 px is left between cells."""
    gap = 1 if w > 4 else 0
    found = []
    for shade in np.unique(cells.shade_LE[cells.shade_LE >= 0]):
        d = []
        for row, columns in enumerate(cells.shade_LE == shade):
            at = None
            for column in np.flatnonzero(columns):
                x = LEFT + int(column) * w
                move = f"M{x} {number(TOP + (row + 0.5) * h)}" if at is None else f"m{x - at} 0" if x > at else ""
                d.append(f"{move}h{w - gap}")
                at = x + w - gap
        found.append(f'<path class="{cells.family}{shade}" d="{"".join(d)}"/>')
    return f'<g class="cells" stroke-width="{h - gap}">{"".join(found)}</g>'


def digits(cells: Cells, w: int, h: int) -> str:
    """Each cell's character; one text a row and shade, with a list of places."""
    found, (rows, _) = [], cells.shade_LE.shape
    for shade, character in (cells.digits or {}).items():
        for row in range(rows):
            columns = np.flatnonzero(cells.shade_LE[row] == shade)
            if columns.size:
                xs = " ".join(number(LEFT + int(c) * w + (w - 1) / 2) for c in columns)
                y = number(TOP + (row + 0.5) * h)
                found.append(f'<text class="{cells.family}{shade}i" y="{y}" x="{xs}">{character * columns.size}</text>')
    return f'<g class="dg" aria-hidden="true" font-size="{number(min(11, w * 0.85))}">{"".join(found)}</g>'


def marks(at_LE: np.ndarray, kind: str, w: int, h: int) -> str:
    """A cross or a dash on the cells where `at_LE`."""
    rx, ry = min(w, h) * 0.22, min(w, h) * 0.22 if kind == "x" else 0
    d = []
    for row, column in zip(*np.nonzero(at_LE), strict=True):
        x, y = LEFT + column * w + (w - 1) / 2, TOP + (row + 0.5) * h
        d.append(f"M{number(x - rx)} {number(y - ry)}L{number(x + rx)} {number(y + ry)}")
        if kind == "x":
            d.append(f"M{number(x - rx)} {number(y + ry)}L{number(x + rx)} {number(y - ry)}")
    return f'<path class="mark" d="{"".join(d)}"/>' if d else ""


def label_step(pixels: float, wanted: float = 12) -> int:
    """Label every n-th row or column so that labels lie `wanted` px apart."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 1 << 30) if step * pixels >= wanted)


def axes(layers: Sequence[int], columns: int, w: int, h: int) -> str:
    row_step, column_step = label_step(h), label_step(w, 24)
    found = [
        f'<text class="ax e" x="{LEFT - 6}" y="{number(TOP + (i + 0.5) * h + 3.5)}">{layer}</text>'
        for i, layer in enumerate(layers)
        if i % row_step == 0
    ]
    found += [
        f'<text class="ax c" x="{number(LEFT + (e + 0.5) * w)}" y="{TOP - 7}">{e}</text>'
        for e in range(0, columns, column_step)
    ]
    return "".join(found)


def colour_bar(scale: Scale, family: str) -> Markup:
    """The shades of a scale with a few of their values."""
    w, left = 16, 26
    ticks = scale.ticks
    blocks = [f'<rect class="{family}{i}" x="{left + i * w}" width="{w}" height="12"/>' for i in range(SHADES)]
    for i, value in enumerate(ticks):
        x = left + SHADES * w * (i / (len(ticks) - 1) if len(ticks) > 1 else 0.5)
        words = ("≤ " if scale.clipped and i == 0 else "") + significant(value, 2)
        blocks.append(f'<text class="ax c" x="{number(x)}" y="25">{words}</text>')
    kind = "logarithmic" if scale.log else "linear"
    title = f"colour scale, {kind}, from {significant(ticks[0])} to {significant(ticks[-1])}"
    return svg(2 * left + SHADES * w, 29, "".join(blocks), title, "bar")

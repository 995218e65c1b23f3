"""The report's other pictures: bytes by part, quantiles and intervals, bytes against loss.

Every text that comes from a file is escaped here; what is returned is safe to put into HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from mopeq.report.svg import number, significant, svg

Box = tuple[float, float, float, float]  # left, top, right, bottom


FEW_TICKS = 3  # fewer tell nobody how far apart two values are


@dataclass(frozen=True)
class Axis:
    """From a value to a place: low … high (powers of ten where `log`) onto start … end px, and never outside."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Px of a value; on a log axis zero and below lie at its low end."""
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def words(self, value: float) -> str:
        """A tick's label."""
        return significant(value, 1) if self.log and len(self.decimal()) >= FEW_TICKS else f"{value:.4g}"

    def decimal(self) -> list[float]:
        """A log axis's 1, 2, 5 of each decade."""
        steps = (1, 2, 5) if self.high - self.low <= 2.5 else (1,)
        powers = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
        found = [m * 10.0**p for p in powers for m in steps]
        return [v for v in found if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]

    def ticks(self) -> list[float]:
        """Round values; on a log axis 1, 2, 5 of each decade, only the powers where decades are many, or a linear
        axis's where it spans too little of one."""
        if self.log:
            few = len(found := self.decimal()) < FEW_TICKS
            return Axis(10.0**self.low, 10.0**self.high, 0, 1).ticks() if few else found
        raw = (self.high - self.low) / 7
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def stacked(rows: Sequence[tuple[str, Sequence[tuple[str, str, int]]]], title: str) -> Markup:
    """Horizontal bars on one scale. rows: (label, segments (class, words, bytes)); words stand where they fit."""
    h, step = 30, 44
    axis = Axis(0, max(sum(n for _, _, n in segments) for _, segments in rows) or 1, 78, 1000)
    found = []
    for i, (label, segments) in enumerate(rows):
        y, before = 4 + i * step, 0
        found.append(f'<text class="lb e" x="{number(axis.start - 10)}" y="{y + h / 2 + 4.5}">{escape(label)}</text>')
        for name, words, count in segments:
            x, w = axis.at(before), axis.at(before + count) - axis.at(before)
            before += count
            found.append(
                f'<rect class="{name}" x="{number(x)}" y="{y}" width="{number(max(0.0, w - 1))}" height="{h}">'
                f"<title>{escape(words)}</title></rect>"
            )
            if w > 7.2 * len(words) + 12:
                found.append(f'<text class="{name}i" x="{number(x + 8)}" y="{y + h / 2 + 4.5}">{escape(words)}</text>')
    return svg(1000, 8 + (len(rows) - 1) * step + h, "".join(found), title, "stack", least=640)


# ------------------------------------------------------------------------------- intervals and quantiles


def interval_strip(value: float, low: float | None, high: float | None, title: str) -> Markup:
    """A score between 0 and 1 with its interval."""
    width, height = 180, 16
    axis = Axis(0, 1, 6, width - 6)
    body = "".join(f'<path class="grid" d="M{number(axis.at(v))} 0v{height}"/>' for v in (0, 0.25, 0.5, 0.75, 1))
    if low is not None and high is not None:
        body += f'<path class="ci" d="M{number(axis.at(low))} 8H{number(axis.at(high))}"/>'
    body += f'<circle class="dot" cx="{number(axis.at(value))}" cy="8" r="3.5"/>'
    return svg(width, height, body, title, "strip")


def quantile_strips(rows: Sequence[tuple[str, Mapping[str, float | None]]], title: str) -> Markup:
    """Several values a row ("mean" as a dot, the rest as ticks) on one log axis. Infinite ones are left out."""
    known = [(name, {k: v for k, v in row.items() if v is not None and math.isfinite(v)}) for name, row in rows]
    positive = [v for _, row in known for v in row.values() if v > 0]
    if not positive:
        return Markup("")
    top = max(positive)
    low = math.floor(math.log10(max(min(positive), top * 1e-8)))
    axis = Axis(low, max(low + 1, math.ceil(math.log10(top) - 1e-9)), 70, 700, log=True)
    step = 42
    height = len(rows) * step + 26
    body = []
    for power in range(int(axis.low), int(axis.high) + 1):
        x = number(axis.at(10.0**power))
        body.append(f'<path class="grid" d="M{x} 4V{height - 20}"/>')
        body.append(f'<text class="ax c" x="{x}" y="{height - 6}">{significant(10.0**power, 1)}</text>')
    body += [quantile_strip(name, row, 26 + i * step, axis) for i, (name, row) in enumerate(known)]
    return svg(720, height, "".join(body), title, "quant", least=560)


def quantile_strip(name: str, row: Mapping[str, float], y: int, axis: Axis) -> str:
    """One row of marks; a label that would touch the one before goes below."""
    places = sorted((axis.at(v), key) for key, v in row.items())
    body = [f'<text class="lb e" x="{number(axis.start - 12)}" y="{y + 4.5}">{escape(name)}</text>']
    if places:
        body.append(f'<path class="span" d="M{number(places[0][0])} {y}H{number(places[-1][0])}"/>')
    end = -1e9  # of the last label above
    for at, key in places:
        x, half = number(at), 3.2 * len(key)
        dot = f'<circle class="dot" cx="{x}" cy="{y}" r="4.5"/>'
        body.append(dot if key == "mean" else f'<path class="tick" d="M{x} {y - 7}v14"/>')
        below = at - half < end + 4
        end = end if below else at + half
        body.append(f'<text class="ax c" x="{x}" y="{y + 19 if below else y - 11}">{escape(key)}</text>')
    return "".join(body)


DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 5", "12 3")


def rank_lines(layers: Sequence[int], rows: Sequence[tuple[str, Sequence[float]]], title: str) -> Markup:
    """Rank correlations -1 … 1 by layer, a line each, told apart by dashes and by their names at the end."""
    width, height = 760, 230
    across = Axis(0, max(1, len(layers) - 1), 46, width - 150)
    upward = Axis(-1, 1, height - 36, 12)
    body = []
    for v in (-1, -0.5, 0, 0.5, 1):
        y = number(upward.at(v))
        body.append(f'<path class="grid" d="M{number(across.start)} {y}H{number(across.end)}"/>')
        body.append(f'<text class="ax e" x="{number(across.start - 8)}" y="{y}" dy="4">{v:g}</text>')
    step = max(1, -(-len(layers) // 16))
    for i in range(0, len(layers), step):
        body.append(f'<text class="ax c" x="{number(across.at(i))}" y="{height - 18}">{layers[i]}</text>')
    body.append(f'<text class="ax c" x="{number((across.start + across.end) / 2)}" y="{height - 3}">layer</text>')
    ends: list[float] = []
    for n, (name, rank_L) in enumerate(rows):
        known = [(across.at(i), upward.at(r)) for i, r in enumerate(rank_L) if r == r]
        if not known:
            continue
        line = "L".join(f"{number(x)} {number(y)}" for x, y in known)
        body.append(f'<path class="rank" stroke-dasharray="{DASHES[n % len(DASHES)]}" d="M{line}"/>')
        body += [f'<circle class="dot" cx="{number(x)}" cy="{number(y)}" r="2.5"/>' for x, y in known]
        at = known[-1][1]
        while any(abs(at - other) < 14 for other in ends):  # the next free place below
            at += 3
        ends.append(at)
        body.append(f'<text class="nm s" x="{number(across.end + 12)}" y="{number(at + 4)}">{escape(name)}</text>')
    return svg(width, height, "".join(body), title, "ranks", least=620)


# ------------------------------------------------------------------------------------------- scatter


@dataclass(frozen=True)
class Dot:
    """One checkpoint in the scatter. `best`: no other given one is both smaller and closer. `uniform`: of one width."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    best: bool
    link: str
    uniform: bool = False


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (bytes, loss) no other point matches or beats in both, being better in one."""
    return [not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]


def scatter(
    dots: Sequence[Dot],
    unit: str,
    title: str,
    words: str = "KL, nats per token",
    log: bool = True,
    size: tuple[int, int] = (760, 400),
    line: float | None = None,
) -> Markup:
    """Bytes (in `unit`, linear) against a loss (log) or a score, points named and linked; `line`: the original's."""
    width, height = size
    xs = [d.x for d in dots]
    ys = [v for d in dots for v in (d.y, d.low, d.high, line) if v is not None and (v > 0 or not log)]
    pad = 0.12 * (max(xs) - min(xs)) or 0.05 * max(xs)
    across = Axis(max(0.0, min(xs) - pad), max(xs) + pad, 64, width - (24 if width > 500 else 62))
    if log:
        upward = Axis(math.log10(min(ys)) - 0.12, math.log10(max(ys)) + 0.12, height - 44, 16, log=True)
    else:
        room = 0.1 * (max(ys) - min(ys)) or 0.05
        upward = Axis(max(0.0, min(ys) - room), max(ys) + 2 * room, height - 44, 16)  # above the original's line: names
    body = [scatter_frame(across, upward, unit, words), scatter_front(dots, across, upward)]
    if line is not None:
        left, high = number(across.start), upward.at(line)
        body.append(f'<path class="same" d="M{left} {number(high)}H{number(across.end)}"/>')
        body.append(f'<text class="ax s" x="{left}" dx="4" y="{number(high + 13)}">original</text>')
    points = [(across.at(d.x), upward.at(d.y)) for d in dots]
    for d, (x, y), (lx, ly, anchor) in zip(
        dots, points, label_places(points, [d.name for d in dots], width), strict=True
    ):
        name = f'<text class="nm {anchor}" x="{number(lx)}" y="{number(ly)}">{escape(d.name)}</text>'
        body.append(f'<a href="{escape(d.link)}">{point_mark(d, x, y)}{name}</a>')
    return svg(width, height, "".join(body), title, "scatter", least=600 if width > 500 else 280, role="group")


def point_mark(d: Dot, x: float, y: float) -> str:
    """A circle, or a square for one width; filled where no other is better in both."""
    name = "dot" if d.best else "dot o"
    if d.uniform:
        return f'<rect class="{name}" x="{number(x - 4.5)}" y="{number(y - 4.5)}" width="9" height="9"/>'
    return f'<circle class="{name}" cx="{number(x)}" cy="{number(y)}" r="5"/>'


def scatter_frame(across: Axis, upward: Axis, unit: str, words: str) -> str:
    """Grid, tick labels and the axes' names."""
    body, bottom = [], upward.start
    for v in across.ticks():
        x = number(across.at(v))
        body.append(f'<path class="grid" d="M{x} {number(upward.end)}V{number(bottom)}"/>')
        body.append(f'<text class="ax c" x="{x}" y="{number(bottom + 17)}">{v:,.6g}</text>')
    for v in (v for v in upward.ticks() if upward.log or v <= 1):
        y = upward.at(v)
        body.append(f'<path class="grid" d="M{number(across.start)} {number(y)}H{number(across.end)}"/>')
        body.append(f'<text class="ax e" x="{number(across.start - 8)}" y="{number(y + 4)}">{upward.words(v)}</text>')
    center, middle = number((across.start + across.end) / 2), number((upward.start + upward.end) / 2)
    body.append(f'<text class="ax c" x="{center}" y="{number(bottom + 36)}">weights, {escape(unit)}</text>')
    body.append(f'<text class="ax c" transform="translate(14 {middle}) rotate(-90)">{escape(words)}</text>')
    return "".join(body)


def scatter_front(dots: Sequence[Dot], across: Axis, upward: Axis) -> str:
    """The lines through the best points and through those of one width, and each point's interval."""
    body = []
    for name, members in (("front", [d for d in dots if d.best]), ("flat", [d for d in dots if d.uniform])):
        line = "L".join(
            f"{number(across.at(d.x))} {number(upward.at(d.y))}" for d in sorted(members, key=lambda d: d.x)
        )
        body += [f'<path class="{name}" d="M{line}"/>'] if len(members) > 1 else []
    for d in dots:
        if d.low is not None and d.high is not None:
            low, high = number(upward.at(d.low)), number(upward.at(d.high))
            body.append(f'<path class="ci" d="M{number(across.at(d.x))} {low}V{high}"/>')
    return "".join(body)


def label_places(
    points: Sequence[tuple[float, float]], names: Sequence[str], width: float
) -> list[tuple[float, float, str]]:
    """(x, y, anchor class) of each label: the first place beside its point that touches no other label or point."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    found = []
    for i, ((x, y), name) in enumerate(zip(points, names, strict=True)):
        others = [box for n, box in enumerate(taken) if n != i]
        spots = label_spots(x, y)
        boxes = [label_box(*spot, 7.0 * len(name)) for spot in spots]
        clear = (b[0] > 0 and b[2] < width and b[1] > 0 and not any(touches(b, t) for t in others) for b in boxes)
        best = next((n for n, free in enumerate(clear) if free), 0)
        taken.append(boxes[best])
        found.append(spots[best])
    return found


def label_spots(x: float, y: float) -> list[tuple[float, float, str]]:
    """Right and above, where the line through the best points never runs; right, left, above, below; then ever further
    up and down at the right."""
    near = [(x + 8, y - 7, "s"), (x + 10, y + 4, "s"), (x - 10, y + 4, "e"), (x, y - 11, "c"), (x, y + 20, "c")]
    return near + [(x + 10, y + 4 + dy, "s") for n in range(1, 12) for dy in (14 * n, -14 * n)]


def label_box(x: float, y: float, anchor: str, width: float) -> Box:
    left = x - {"s": 0.0, "e": width, "c": width / 2}[anchor]
    return (left, y - 11, left + width, y + 3)


def touches(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

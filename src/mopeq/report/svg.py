"""SVG as text: coordinates, numbers for people, and the picture's frame. Colours are CSS classes: the page's say."""

from __future__ import annotations

import math
from html import escape

from markupsafe import Markup


def number(x: float) -> str:
    """A coordinate, short."""
    return f"{x:.2f}".rstrip("0").rstrip(".")


def significant(x: float | None, digits: int = 3) -> str:
    """A value for people: `digits` significant ones, plain where that is short, else 1.2e-07."""
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if x == 0:
        return "0"
    size = math.floor(math.log10(abs(x)))
    if -4 <= size < 6:
        return f"{x:,.{max(0, digits - 1 - size)}f}"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def svg(
    width: float, height: float, body: str, title: str, name: str, extra: str = "", least: float = 0, role: str = "img"
) -> Markup:
    """A picture with a title for screen readers, between `least` and `width` px wide."""
    style = f"max-width:{number(width)}px" + (f";min-width:{number(least)}px" if least else "")
    return Markup(
        f'<svg class="{name}" viewBox="0 0 {number(width)} {number(height)}" role="{role}"'
        f' aria-label="{escape(title)}" style="{style}"{extra}>{body}</svg>'
    )

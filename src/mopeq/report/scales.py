"""Colours and scales: single-hue ramps that lightness alone can tell apart, in a light and a dark version.

Ramps are mixed in OKLab (Ottosson 2020), where equal steps look equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WIDTH_SHADES = 8
SHADES = 12  # of a sensitivity or a token count
LOG_FROM = 30.0  # a positive range wider than this factor is drawn on a log scale
LOG_DECADES = 6  # and no deeper than this below its top
LOG_CLIP = 0.01  # of the positive values may lie below a log scale's low end, lest a few wash out the rest
# (lightest in light mode, darkest), (darkest in dark mode, lightest): few is close to the page, many stands out
RAMPS = {
    "w": (("#dfe8f5", "#12305f"), ("#1e2c42", "#b4d2ff")),
    "s": (("#f7ecd9", "#6d3200"), ("#2f2417", "#ffcf94")),
    "t": (("#dcefea", "#084640"), ("#182f2c", "#9be6d6")),
}


def to_linear(hex_colour: str) -> np.ndarray:
    """#rrggbb -> linear light, 0 to 1."""
    c = np.array([int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def to_hex(linear: np.ndarray) -> str:
    c = np.clip(linear, 0, 1)
    c = np.where(c <= 0.0031308, 12.92 * c, 1.055 * c ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(float(x) * 255):02x}" for x in c)


LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def mix(a: str, b: str, share: float) -> str:
    """The colour `share` of the way from a to b in OKLab."""
    p, q = (LAB @ np.cbrt(LMS @ to_linear(x)) for x in (a, b))
    return to_hex(np.linalg.solve(LMS, np.linalg.solve(LAB, p + share * (q - p)) ** 3))


def luminance(hex_colour: str) -> float:
    """WCAG relative luminance."""
    return float(to_linear(hex_colour) @ [0.2126, 0.7152, 0.0722])


def ink_on(hex_colour: str) -> str:
    """Black or white, whichever contrasts more: at least 4.58 to 1 on any colour."""
    y = luminance(hex_colour) + 0.05
    return "#000000" if y / 0.05 > 1.05 / y else "#ffffff"


def ramp(family: str, dark: bool) -> list[str]:
    """All shades of one family, few to many."""
    low, high = RAMPS[family][dark]
    count = WIDTH_SHADES if family == "w" else SHADES
    return [mix(low, high, i / (count - 1)) for i in range(count)]


def variables(dark: bool) -> str:
    """CSS custom properties: --w3 is a fill, --w3i the ink that is read on it."""
    rows = [
        f"--{family}{i}:{colour};--{family}{i}i:{ink_on(colour)};"
        for family in RAMPS
        for i, colour in enumerate(ramp(family, dark))
    ]
    return "".join(rows)


def width_shades(count: int) -> list[int]:
    """Shades for `count` formats, spread over the ramp."""
    if count == 1:
        return [WIDTH_SHADES // 2]
    return [round(1 + i * (WIDTH_SHADES - 2) / (count - 1)) if count < 7 else min(i, 7) for i in range(count)]


@dataclass(frozen=True)
class Scale:
    """From a value to a shade: linear from low to high, or logarithmic where the values span decades."""

    low: float
    high: float
    log: bool
    clipped: bool = False  # some values lie below `low` and take the lowest shade

    def shade(self, values: np.ndarray) -> np.ndarray:
        """0 … SHADES-1; -1 where there is no number. On a log scale, zero and below take the lowest."""
        if self.high <= self.low:
            at = np.full(values.shape, 0.5)
        elif self.log:
            safe = np.where(values > 0, values, self.low)
            at = np.log(safe / self.low) / math.log(self.high / self.low)
        else:
            at = (values - self.low) / (self.high - self.low)
        known = np.isfinite(values)
        return np.where(known, np.clip(np.where(known, at, 0) * SHADES, 0, SHADES - 1), -1).astype(np.int64)

    @property
    def ticks(self) -> list[float]:
        """A few values to write below the colour bar, ends included."""
        if self.high <= self.low:
            return [self.low]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [self.low, middle, self.high]


def scale_of(values: np.ndarray) -> Scale:
    """The scale for all numbers of one figure's panels together."""
    known = values[np.isfinite(values)]
    if not known.size:
        return Scale(0.0, 0.0, False)
    high, positive = float(known.max()), known[known > 0]
    if positive.size and high > LOG_FROM * float(positive.min()):
        low = max(float(np.quantile(positive, LOG_CLIP, method="lower")), high * 10.0**-LOG_DECADES)
        return Scale(low, high, True, bool((positive < low).any()))
    return Scale(float(known.min()), high, False)

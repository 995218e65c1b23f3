"""What the page needs to solve other budgets itself: items' costs, matrices' shapes, and all bytes that no map changes.

`solve.js` is the allocator and `explore.js` the page's part. Costs are the allocator's own, to the last bit, so that
the page's map is the map of `mopeq map --fit`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopeq.nouns import Format
from mopeq.report.facts import ALL, Widths
from mopeq.report.scales import ramp

APART = ("projection", "gate-up", "layer-projection")  # values of --per whose maps differ by projection


@dataclass(frozen=True)
class Explorer:
    """Budgets to be solved in the page. `layers`: (number, prefix, experts, {projection: (out, in)}).

    cost_JF: items by `formats`, as `per` ties them. `other`: bytes by role that no map changes. `start`: the bytes of
    weights to begin with. `command`: the command that makes a checkpoint, before and after its bytes.
    """

    per: str
    formats: tuple[Format, ...]
    layers: tuple[tuple[int, str, int, Mapping[str, tuple[int, int]]], ...]
    cost_JF: np.ndarray
    unit: str
    other: Mapping[str, int]
    start: int
    command: tuple[str, str]

    @property
    def panels(self) -> tuple[str, ...]:
        """The maps to draw: one a projection, or one for all."""
        return tuple(self.layers[0][3]) if self.per in APART else (ALL,)


def first_map(e: Explorer, made: Widths) -> Widths:
    """The checkpoint's own map in the explorer's formats and panels, to be drawn before anything is solved."""
    index = np.array([*(e.formats.index(f) for f in made.formats), -1])
    grids = {panel: index[made.grids.get(panel, next(iter(made.grids.values())))] for panel in e.panels}
    return Widths(e.formats, made.layers, grids, {f.name: made.counts.get(f.name, 0) for f in e.formats}, made.digest)


def explorer_data(e: Explorer, shades: Mapping[Format, int], words: Callable[[str], str]) -> dict[str, Any]:
    """The explorer as JSON. Costs are little-endian floats in base64: 4 bytes each where that loses nothing, else 8."""
    short = np.array_equal(e.cost_JF.astype(np.float32), e.cost_JF)
    raw = e.cost_JF.astype("<f4" if short else "<f8").tobytes()
    return {
        "per": e.per,
        "formats": [
            {
                "name": f.name,
                "bits": f.bits,
                "group": f.group_size,
                "scheme": f.scheme,
                "shade": shades[f],
                "colours": [ramp("w", dark)[shades[f]] for dark in (False, True)],
            }
            for f in e.formats
        ],
        "layers": [[number, experts, shapes] for number, _, experts, shapes in e.layers],
        "prefixes": [prefix for _, prefix, _, _ in e.layers],
        "costs": {"type": "float32" if short else "float64", "data": base64.b64encode(raw).decode()},
        "unit": e.unit,
        "other": [[words(role), n] for role, n in e.other.items()],
        "start": e.start,
        "command": list(e.command),
    }

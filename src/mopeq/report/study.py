"""The paper's question: is an expert that matters an expert that is often used? Ranks of the two, layer by layer.

A value is an expert's, summed over its projections, in grids [L, E]; NaN where a layer has no such expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Yardstick:
    """Another way to rank experts. rank_L: its rank correlation with the map's sensitivity in each layer.

    changed: how many of the matrices would get another width by it, at the same code bits (None: not solved).
    measured: its rank correlation with the measured losses of single experts (None: none were measured).
    """

    name: str
    rank_L: tuple[float, ...]
    changed: int | None
    measured: float | None

    @property
    def known(self) -> list[float]:
        return [r for r in self.rank_L if r == r]

    @property
    def mean(self) -> float | None:
        return sum(self.known) / len(self.known) if self.known else None

    @property
    def lowest(self) -> float | None:
        return min(self.known, default=None)

    @property
    def highest(self) -> float | None:
        return max(self.known, default=None)


@dataclass(frozen=True)
class Study:
    """The map's sensitivity against other yardsticks. `measured`: (experts, format) of the losses that were measured by
    storing one expert alone in that format; `own`: their rank correlation with the sensitivity."""

    method: str
    layers: tuple[int, ...]
    value_LE: np.ndarray
    tokens_LE: np.ndarray
    others: tuple[Yardstick, ...]
    matrices: int
    measured: tuple[int, str] | None
    own: float | None


def study(
    method: str,
    layers: tuple[int, ...],
    value_LE: np.ndarray,
    tokens_LE: np.ndarray,
    others: Mapping[str, tuple[np.ndarray, int | None]],
    matrices: int,
    measured: tuple[str, Sequence[tuple[int, int, float]]] | None,
) -> Study:
    """others: {name: (grid [L, E], matrices changed)}; measured: the format and (layer, expert, loss) of a sample."""
    rows = {layer: i for i, layer in enumerate(layers)}

    def against_loss(grid_LE: np.ndarray) -> float | None:
        if measured is None:
            return None
        places = [(rows[layer], e) for layer, e, _ in measured[1]]
        return rank_correlation(np.array([grid_LE[p] for p in places]), np.array([loss for *_, loss in measured[1]]))

    found = tuple(
        Yardstick(name, tuple(map(rank_correlation, value_LE, grid_LE)), changed, against_loss(grid_LE))
        for name, (grid_LE, changed) in others.items()
    )
    sample = None if measured is None else (len(measured[1]), measured[0])
    return Study(method, layers, value_LE, tokens_LE, found, matrices, sample, against_loss(value_LE))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean; NaN for a constant or fewer than three."""
    known = np.isfinite(a) & np.isfinite(b)
    x, y = ranks(a[known]), ranks(b[known])
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """0 for the least; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def minmax_product(a_LE: np.ndarray, b_LE: np.ndarray) -> np.ndarray:
    """The paper's hybrid over the model: both scaled to 0 … 1, then multiplied; equal scores all become 0."""

    def scaled(x: np.ndarray) -> np.ndarray:
        low, high = np.nanmin(x), np.nanmax(x)
        return (x - low) / (high - low) if high > low else x * 0.0

    return scaled(a_LE) * scaled(b_LE)

"""The paper's hybrid: minmax(frequency) * minmax(hessian) of each expert, scaled over the model or over each layer."""

from __future__ import annotations

import numpy as np

from mopeq.nouns import Sensitivity
from mopeq.sense import frequency, hessian
from mopeq.sense.scene import Scene, from_scores, spread


def minmax(score_LE: list[np.ndarray], scope: str) -> list[np.ndarray]:
    """Scores scaled to 0…1 over the whole model or within each layer; equal scores all become 0."""

    def scaled(x: np.ndarray, low: float, high: float) -> np.ndarray:
        return (x - low) / (high - low) if high > low else np.zeros_like(x)

    if scope == "layer":
        return [scaled(x, x.min(), x.max()) for x in score_LE]
    low, high = min(x.min() for x in score_LE), max(x.max() for x in score_LE)
    return [scaled(x, low, high) for x in score_LE]


def per_expert(scene: Scene, score_I: np.ndarray) -> list[np.ndarray]:
    """Linears' scores summed over each expert's projections, per layer."""
    rows, at = [], 0
    for layer in scene.spec.layers:
        n = layer.experts * len(layer.projections)
        rows.append(score_I[at : at + n].reshape(layer.experts, -1).sum(1))
        at += n
    return rows


def sense(scene: Scene) -> Sensitivity:
    counts = frequency.count(scene)
    often = minmax(per_expert(scene, frequency.expert_scores(scene, counts)), scene.scope)
    curved = minmax(per_expert(scene, hessian.scores(scene)), scene.scope)
    score_I = spread(scene, [a * b for a, b in zip(often, curved, strict=True)])
    return from_scores(scene, "hybrid", score_I, **frequency.token_facts(scene, counts))
